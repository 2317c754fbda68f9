import os

if os.environ.get("KERNELS_RAN"):  # here, as ranks of tests import this package and no conftest.py
    from tests.kernels.interpreter import note_kernels

    note_kernels(os.environ["KERNELS_RAN"])
