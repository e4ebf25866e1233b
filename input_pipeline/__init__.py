"""Data sets and batches: everything that imports TensorFlow, and nothing else does.

TensorFlow only decodes and transforms pictures here, so its start-up notices are of no use to a user of this program.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
