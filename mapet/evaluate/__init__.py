"""How good are frozen features? kNN and linear probes on a labelled set, with all labels and with a few per class."""
