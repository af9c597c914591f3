"""Every process of the tests has one thread and asks no hub.

Two busy threads make each other many times slower on small machines, and a hub that does not answer is waited for.
"""

import os

for name, value in (("OMP_NUM_THREADS", "1"), ("HF_HUB_OFFLINE", "1"), ("TOKENIZERS_PARALLELISM", "false")):
    os.environ.setdefault(name, value)  # before torch and huggingface_hub read them

import torch  # noqa: E402

torch.set_num_threads(1)
