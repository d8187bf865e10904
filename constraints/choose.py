"""Prints the file of constraints for the Python that runs it, such as `constraints/py312.txt`; none for another Python.

pip takes it as `pip install -c $(python constraints/choose.py) ...`, in the Makefile and in the images of docker/.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
version = f"{sys.version_info.major}.{sys.version_info.minor}"
path = HERE / f"py{version.replace('.', '')}.txt"
if not path.is_file():
    known = ", ".join(f"{p.stem[2]}.{p.stem[3:]}" for p in sorted(HERE.glob("py*.txt")))
    sys.exit(
        f"error: Python {version} has no set of tested versions; use one of {known}, or install without constraints"
    )
print(path)
