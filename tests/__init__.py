"""The tests. Before any of them imports numpy or torch:"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of each pytest process: there may be several
# The kernel of numpy's BLAS for every CPU with AVX2. By itself it picks one by the CPU, and the last digits of figures follow.
os.environ.setdefault("OPENBLAS_CORETYPE", "Haswell")
