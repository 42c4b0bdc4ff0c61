"""manylora: one frozen base model, many LoRA adapters, every forward pass shared.

The environment is set here because this is the first code of the package that runs. OpenMP reads its
wait policy when its library is loaded, which importing torch does; with the default, idle worker threads
spin, and on a machine whose cores are shared with the HTTP side one step takes many times longer.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

__version__ = "0.1.0"
