"""What users run to measure: `python -m bench --help`. Records are kept in bench/results/."""
