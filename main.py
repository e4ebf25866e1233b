"""TaskExpert-JAX: train, evaluate, predict. See README.md.

python main.py --config=configs/nyud.py:vit_l16 --workdir=DIR                            # train, or resume
python main.py --mode=evaluate --workdir=DIR                                             # a checkpoint's metrics
python main.py --mode=predict --workdir=DIR --images=FILE_OR_DIR --output=DIR
python main.py --mode=export --workdir=DIR --output=DIR                                  # a program for JAX alone
python main.py --mode=compile --config=... --topology=v5e:4x4       # memory and traffic, without the hardware
"""

from taskexpert_jax import modes

if __name__ == "__main__":
    modes.main()
