"""Settings, in YAML files and on the command line: what is wrong is said in one line, with the file and its line."""

import os
import re
from argparse import Action
from collections.abc import Sequence
from difflib import get_close_matches
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import DefaultHelpFormatter
from lightning.pytorch import callbacks, loggers
from lightning.pytorch.cli import LightningArgumentParser

EXPECTED = r"Parser key \"([\w.]+)\":\s*Expected an? (?:<class '(\w+)'>|typing.Literal\[(.*?)\])\. Got value: (.*)"
KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text"}
FORMS = {
    "data.image_size": "224, or [224, 320] for height and width",
    "model.resolution": "[[0.4, 0.5], [0.7, 0.75]]: pairs of a share of the steps and a factor of the size until then",
}
VALUES = {"save_dir": "save_dir FOLDER", "monitor": "monitor val/loss"}  # of what callbacks and loggers need
JOINED = re.compile(r"--config=|-c=?(?=.)")  # an option with its file in the same word
DERIVED = {  # settings that follow from others, or from the images; jsonargparse passes over them in a file
    "model.image_size": "data.image_size",
    "model.white": "data.white",
    **dict.fromkeys(("model.class_names", "model.mean", "model.std"), ""),
    "data.seed": "seed_everything",
    "data.compile": "model.compile",
    "checkpoint.dirpath": "trainer.default_root_dir",
}
SECTIONS = {"model", "data", "data.augment", "trainer", "checkpoint", "guard"}


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
    for part in (settings, *(part for part in settings.values() if isinstance(part, dict))):  # or under ``fit:``
        inner = part.get("data")
        named = {**part, "data.augment": (inner.get("augment") or {}) if isinstance(inner, dict) else {}}
        for name in SECTIONS & named.keys():
            value = named[name]
            # A file may hold the settings instead, beside this one.
            file = isinstance(value, str) and any(map(os.path.isfile, (value, path.parent / value)))
            if not isinstance(value, dict) and not file:
                raise ConfigError(
                    f"{path}: {name} is {value!r}, where settings belong: 'NAME: VALUE' in lines below it"
                )


class HelpFormatter(DefaultHelpFormatter):
    """Defaults that hold only without ``model.pretrained`` are shown like any other."""

    def _expand_help(self, action: Action) -> str:
        return re.sub(r"Conditional<[\w-]+> {(.*), NOT_ACCEPTED}", r"\1", super()._expand_help(action))


class Parser(LightningArgumentParser):
    """Lightning's, whose mistakes and help are for people."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, formatter_class=HelpFormatter, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """One line, with the option that was perhaps meant; the usual way is to print all options first."""
        if re.search(r"required: (fit|validate|test)\.data\.dataset", message):
            message = "no data set is named: give --data.dataset, or a --config FILE that names one"
        union = r'Parser key "([\w.]+)":.*?Does not validate against any of the Union subtypes(.*)Given value: (.*)'
        if mistaken := re.search(union, message, re.S):  # whose text names types of Python, not what to write
            message = refusal(*mistaken.groups())
        elif mistaken := re.search(EXPECTED, message):
            name, kind, choices, value = mistaken.groups()
            kind = KINDS.get(kind, kind) or choices.replace("'", "")
            message = f"{name} cannot be {value}; give {FORMS.get(name, kind)}"
        elif mistaken := re.search(r"Parser key \"([\w.]+)\":\s*Unable to load config '(.*?)'\s", message, re.S):
            name, value = mistaken.groups()
            message = f"{name} is {value}, where settings belong: give them one by one, as --{name}.NAME VALUE"
        if wrong := re.search(r"(?:unrecognized arguments: --|does not accept option ')([\w.]+)", message):
            parser = getattr(ex, "subcommand_parser", self)
            names = [name for action in parser._actions for name in action.option_strings]
            known = [name.lstrip("-") for name in names if " " not in name]  # those with spaces are links
            dashes = "--" if "arguments: --" in wrong[0] else ""
            message += "".join(f"; did you mean {dashes}{name}?" for name in meant(wrong[1], known))
        raise ValueError(message) from ex


def meant(wrong: str, known: Sequence[str]) -> list[str]:
    """The option that was perhaps meant, or none: alike in its own name, and then in what it is a setting of."""
    own = get_close_matches(wrong.rpartition(".")[2], [name.rpartition(".")[2] for name in known], n=1, cutoff=0.7)
    return get_close_matches(wrong, [name for name in known if name.rpartition(".")[2] in own], n=1, cutoff=0)


def refusal(name: str, types: str, value: str) -> str:
    """What a setting cannot be, and what it could.

    Args:
        name: Of the setting.
        types: What jsonargparse says of each type that it may have.
        value: As jsonargparse shows it.
    """
    if said := re.search(r"- ([\w.]+ cannot be .*)", types):  # by the parser of a class's own options
        return f"{name}.{said[1]}"
    if nested := re.fullmatch(r"NestedArg\(key='(.*?)', val='?(.*?)'?\)", value.strip()):
        return f"{name}.{nested[1]}: there is no such option of what {name} names"
    if odd := re.search(r"Option '([\w.]+)' is not accepted", types):  # in a file
        way = "; give a class as 'class_path: NAME', and its options below 'init_args:'" if "." in odd[1] else ""
        return f"{name}: there is no option {odd[1]}{way}"
    why = re.search(r"Problem with given class_path '[\w.]+':\s*(module .*|No module .*)", types)
    if named := re.search(r"(?:given class_path '|import path string: )([\w.]+)", types):  # one class of a file's list
        value = named[1]
    lacks = re.search(r"required: ([\w, ]+)", types)
    if classes := re.findall(r"Namespace\(class_path='[\w.]*?(\w+)'((?:(?!Namespace\(class_path).)*)", value, re.S):
        missing = f"{lacks[1].split(', ')[0]}=None" if lacks else ""
        value = next((given for given, arguments in classes if missing in arguments), classes[-1][0])
    choices = sorted(set(re.findall(r"'([\w-]+)'", "".join(re.findall(r"Literal\[(.*?)\]", types)))))
    forms = FORMS.get(name) or ", ".join(choices)
    if name in ("trainer.callbacks", "trainer.logger"):
        near = get_close_matches(value, dir(callbacks if name == "trainer.callbacks" else loggers), n=1)
        forms = "".join(f"{one}?" for one in near if one != value)
        if lacks:
            forms = f"it with --{name}.{VALUES.get(lacks[1], lacks[1])}"
        if "." in value and value.partition(".")[0] not in ("lightning", "vit"):
            forms = "one of lightning or vit; import_path_allowlist in train.py lets in others"
    return f"{name} cannot be {value}" + (f": {why[1]}" if why else f"; give {forms}" if forms else "")


def configs_first(words: Sequence[str]) -> list[str]:
    """A command with its files right behind it, in their order: options are laid over them, wherever they stand."""
    command, *words = words
    files: list[str] = []
    others: list[str] = []
    rest = iter(words)
    for word in rest:
        if word in ("--config", "-c"):
            files += [word, *islice(rest, 1)]
        else:
            (files if JOINED.match(word) else others).append(word)
    return [command, *files, *others]


def configs(args: Any) -> list[str]:
    """The files that follow ``--config``; in ``--config=~/FILE`` no shell has put the home in the place of ``~``."""
    words = [str(word) for word in args] if isinstance(args, list | tuple) else []
    apart = [path for option, path in pairwise(words) if option in ("--config", "-c")]
    joined = [word[option.end() :] for word in words if (option := JOINED.match(word))]
    return [os.path.expanduser(path) for path in (*apart, *joined)]


def mentioned(args: Any, part: str) -> set[str]:
    """Names of settings that the command or its files mention; parsing makes them one with the defaults.

    Args:
        args: The command.
        part: What they are settings of, such as ``model``.

    Raises:
        ValueError: If they are mentioned as a whole, where none could be told from a default.
    """
    names = mentions(args, part)
    if part in names:
        raise ValueError(f"give the {part}'s settings one by one, as some depend on others: --{part}.NAME VALUE")
    return {name.removeprefix(f"{part}.") for name in names}


def mentions(args: Any, part: str) -> list[str]:
    """Settings of a part that the command or its files mention, with the part's name before them, or that alone."""
    words = [str(word) for word in args] if isinstance(args, list | tuple) else []
    names = [word[2:].partition("=")[0] for word in words if word.startswith(f"--{part}")]
    for path in configs(args):
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        for settings in (found, *(inner for inner in found.values() if isinstance(inner, dict) and part in inner)):
            parts = settings.get(part)
            names += [f"{part}.{name}" for name in parts] if isinstance(parts, dict) else [part] if parts else []
            names += [name for name in settings if str(name).startswith(f"{part}.")]
    return names


def refuse_derived(args: Any) -> None:
    """Refuse what would be passed over in a file, because it follows from something else: the model would differ.

    Args:
        args: The command; of files that are not there the parser says so.

    Raises:
        ConfigError: With what to give instead.
    """
    if not all(os.path.isfile(path) for path in configs(args)):
        return
    named = {name for part in ("model", "data", "checkpoint") for name in mentions(args, part)}
    for name, source in DERIVED.items():
        if name in named:
            way = f"follows from {source}: give that" if source else "comes from the images: leave it out"
            raise ConfigError(f"{name} {way}")
