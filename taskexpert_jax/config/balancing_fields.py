"""Fields of task balancing: the method, and those of each method."""

from collections.abc import Mapping

from taskexpert_jax.config.field import Field
from taskexpert_jax.config.rules import matching, number, whole

BALANCING = "balancing"  # the field that says which of the others there are

METHOD = Field(
    "fixed",
    matching(r"[a-z]\w*", "must be a name of lower-case letters, digits and underscores"),
    "how the losses of the tasks are balanced, a row of training/balancing/__init__.py (docs/balancing.md)",
)

# Further fields by balancing. A method of your own may have any fields, in a group of its name.
METHODS: Mapping[str, Mapping[str, Field]] = {
    "fixed": {},
    "uncertainty": {
        "uncertainty.learning_rate": Field(1e-3, number(0), "constant rate of Adam for the log-variances"),
    },
    "dwa": {
        "dwa.window": Field(200, whole(1), "steps whose mean losses are compared, an epoch in the paper"),
        "dwa.temperature": Field(2.0, number(0.001, 1000), "divides the ratios of the losses"),
    },
    "pcgrad": {},
    "famo": {
        "famo.learning_rate": Field(0.025, number(0), "rate of Adam for the logits of the weights"),
        "famo.gamma": Field(0.01, number(0), "pulls the logits to 0, an L2 term"),
    },
}
