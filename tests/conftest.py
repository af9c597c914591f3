"""One thread per test process: two busy threads make each other many times slower on small machines."""

import torch

torch.set_num_threads(1)
