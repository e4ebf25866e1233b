from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict

def DEFINE_config_file(name: str, default: str | None = None, help_string: str = ...) -> flags.FlagHolder[Any]: ...
def DEFINE_config_dict(
    name: str,
    config: ConfigDict,
    help_string: str = ...,
    *,
    sys_argv: Sequence[str] | None = None,
    flag_values: flags.FlagValues = ...,
) -> flags.FlagHolder[Any]: ...
def get_override_values(config_flag: flags.Flag[Any]) -> dict[str, Any]: ...
