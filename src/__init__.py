"""Import this before torch, which reads what is set here when it starts."""

import os

# Large pages for tensors in the machine's memory: a CPU's step spends a tenth of its time on asking for small ones anew.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
