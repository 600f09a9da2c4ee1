"""Configuration files, looked at before they are used: what is wrong in them is said with the file and the line."""

from pathlib import Path
from typing import Any

import yaml


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line."""


class _Loader(yaml.SafeLoader):
    """YAML in which a key that comes twice is an error, as the first one would be ignored, and one without a value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for number, key in enumerate(keys):
            if key.value in [other.value for other in keys[:number]]:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
        for key, value in node.value:
            if isinstance(value, yaml.ScalarNode) and value.value == "" and value.style is None:
                why = f"{key.value!r} has no value; give it one, or null, or remove it"
                raise yaml.constructor.ConstructorError(None, None, why, key.start_mark)
        return super().construct_mapping(node, deep)


def check_config(path: str | Path) -> None:
    """See that a file is YAML of settings; what the settings mean is the parser's affair.

    Args:
        path: The file; one that is not there, or no file, is left to the parser.

    Raises:
        ConfigError: If it is no text, no YAML, holds no settings, or has a key twice or without a value.
    """
    path = Path(path)
    if not path.is_file():
        return
    try:
        settings = yaml.load(text := path.read_text(encoding="utf-8"), _Loader)
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}, line {line}: no UTF-8; save the file as UTF-8") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line if error.problem_mark else 0
        tab = any("\t" in words for words in text.splitlines()[line : line + 1])
        why = "a tab, where YAML wants spaces" if tab else error.problem
        raise ConfigError(f"{path}, line {line + 1}: {why}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: no YAML ({' '.join(str(error).split())})") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: holds no settings, as 'model:' and below it '  lr: 0.001'")
