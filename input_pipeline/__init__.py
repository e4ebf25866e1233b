"""Data sets and batches; the only package that imports TensorFlow.

TensorFlow only feeds batches, so its notices are silenced: they do not concern the user. It would also print
tracebacks of examples that cannot be read, which the program reports in one line.
"""

import os

if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":  # 1 is set by JAX, which may have been imported before
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
