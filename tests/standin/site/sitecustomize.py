"""Read by Python at its start where this folder is on PYTHONPATH: installs the stand-in."""

import standin

standin.install()
