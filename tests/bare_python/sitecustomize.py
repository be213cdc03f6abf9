"""With this folder on PYTHONPATH, Python finds torch, triton, numpy and what these need, and no other package."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))
import absent_packages

sys.path.pop()
absent_packages.hide(absent_packages.absent(("torch", "triton", "numpy"), ()))
