"""What processes are forked from: a run's imports are behind it, and the garbage collector leaves alone what they made.

Both would else cost every process a second.
"""

import gc

import deepspeed  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
import tyro  # noqa: F401
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification  # noqa: F401

import train  # noqa: F401

gc.collect()
gc.freeze()
