"""The tests. Before any of them imports numpy or torch:"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # of each pytest process, of which there may be several, and of all that it starts
# The kernel of numpy's BLAS for every CPU with AVX2. By itself it picks one by the CPU, and the last digits of figures follow.
os.environ.setdefault("OPENBLAS_CORETYPE", "Haswell")
