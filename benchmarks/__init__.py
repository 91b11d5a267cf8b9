import src  # noqa: F401 (before torch, as the scripts do)
