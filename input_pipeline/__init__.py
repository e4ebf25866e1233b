"""Data sets and batches; the only package that imports TensorFlow.

TensorFlow only feeds batches, so its start-up notices are silenced: they do not concern the user.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
