"""Load, check and compare configs: a Python file with arguments, or a JSON or YAML file that may name a base.

    configs/meanflow_mdct.py:objective=autoencoder,runlocal     get_config("objective=autoencoder,runlocal")
    workdir/config.json                                         a finished run's
    mine.yaml: {base: configs/meanflow_mdct.py, optimizer: {lr: 1e-4}}    the base, overridden; its path is from there

A leaf that is None is one that the user must still give.
"""

import difflib
import importlib.util
import json
import pathlib
import re
from typing import Any

import yaml
from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags
from ml_collections.config_dict import placeholder

from meanflow_audio_codec.errors import InputError

UNITS = ("steps", "epochs", "examples", "percent")
# A rerun in the same workdir may change these: they touch neither the model nor the data, as long as that is intact.
# Another total stretches the learning-rate schedule from here on.
FREE_FIELDS = (
    *("total_", "log_", "checkpoint_", "evals.", "resume", "init_from"),
    *("input.read_threads", "input.bad_files"),
)


class _YamlLoader(yaml.SafeLoader):
    """YAML 1.2's numbers: 1e-4 is one, as in JSON."""


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def load_config(spec: str, heirs: tuple[pathlib.Path, ...] = ()) -> ConfigDict:
    """Load `PATH` or `PATH.py:ARGUMENTS` as a locked config.

    `heirs` are the files whose base it is; PATH is relative to the last of them.

    Raises:
        InputError: no such file, a file that is not a config, an unknown or mistyped key in it.
    """
    path, is_python, arg = spec.partition(".py:")
    file = pathlib.Path(path + ".py" if is_python else path).expanduser()
    if heirs:
        file = heirs[-1].parent / file
    if file in heirs:
        raise InputError(f"--config: {file} is its own base; name another")
    if not file.is_file():
        raise InputError(f"--config: no file {file}; give a .py, .json or .yaml config")
    if file.suffix == ".py":
        config = _load_python(file, arg)
    elif file.suffix in (".json", ".yaml", ".yml"):
        config = _load_data(file, heirs)
    else:
        raise InputError(f"--config: {file} must end in .py, .json or .yaml")
    return config.lock()


def parse_arg(arg: str | None, **defaults: Any) -> ConfigDict:
    """Parse `key=value,flag,...` into the types of `defaults`; a bare key sets a bool to True.

    Raises:
        InputError: a key that is not in `defaults`, or a value of another type.
    """
    values = ConfigDict(defaults)
    for item in filter(None, (arg or "").split(",")):
        key, given, text = item.partition("=")
        if key not in defaults:
            raise InputError(f"config argument {key!r} is unknown{near_match(key, defaults)}")
        if not given and not isinstance(defaults[key], bool):
            raise InputError(f"config argument {key} needs a value: {key}=...")
        values[key] = _parse_value(key, text if given else "true", type(defaults[key]))
    return values


def _parse_value(key: str, text: str, kind: type) -> Any:
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise InputError(f"config argument {key}={text}: give true or false")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError:
        raise InputError(f"config argument {key}={text}: give a value of type {kind.__name__}") from None


def override_from_flags(config: ConfigDict, arguments: list[str]) -> ConfigDict:
    """Return `config` with the leaves that `--config.a.b=VALUE` arguments name replaced, typed by the old values.

    A duration may change its unit: `--config.total_epochs=3` takes the place of `total_steps`.

    Raises:
        InputError: an unknown field (its near match is named), or a value of another type.
    """
    config.unlock()
    flat = leaves(config)
    for argument in arguments:
        name = argument.removeprefix("--config.").partition("=")[0]
        if not argument.startswith("--config."):
            raise InputError(f"unknown argument {argument}; fields are set by --config.FIELD=VALUE")
        if name not in flat:
            _new_unit(config, name, arguments, near_match(name, flat))
    flag_values = flags.FlagValues()
    argv = ["train.py", *arguments]
    config_flags.DEFINE_config_dict("config", config, flag_values=flag_values, sys_argv=argv)
    try:
        flag_values(argv)
    except flags.Error as error:
        raise InputError(" ".join(str(error).removeprefix("flag ").split())) from None
    return flag_values.config


def _new_unit(config: ConfigDict, name: str, arguments: list[str], match: str) -> None:
    """Make room for duration `name` in place of its other unit, unless the user sets that one too."""
    *parents, key = name.split(".")
    owner = config
    for part in parents:
        owner = owner.get(part) if isinstance(owner, ConfigDict) else None
    stem, _, unit = key.rpartition("_")
    keys = owner.keys() if isinstance(owner, ConfigDict) else ()
    others = [f"{stem}_{u}" for u in UNITS if f"{stem}_{u}" in keys]
    if unit not in UNITS or not others:
        raise InputError(f"--config.{name}: no such config field{match}")
    for other in others:
        flag = ".".join(["--config", *parents, other]) + "="
        if not any(argument.startswith(flag) for argument in arguments):
            del owner[other]
    owner[key] = 0.0


def _load_python(file: pathlib.Path, arg: str) -> ConfigDict:
    module_spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise InputError(f"--config: {file} has no function get_config(arg)")
    return module.get_config(arg or None)


def _load_data(file: pathlib.Path, heirs: tuple[pathlib.Path, ...]) -> ConfigDict:
    try:
        text = file.read_text()
        values = json.loads(text) if file.suffix == ".json" else yaml.load(text, _YamlLoader)
    except (yaml.YAMLError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"--config: {file} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"--config: {file} holds no mapping of fields")
    base = values.pop("base", None)
    if base is None:
        return ConfigDict(_leaf(values))
    if not isinstance(base, str):
        raise InputError(f"--config: {file} has base {base!r}; give the path of a config")
    config = load_config(base, (*heirs, file)).unlock()
    _override(config, values, str(file))
    return config


def _override(config: ConfigDict, values: dict[Any, Any], source: str, prefix: str = "") -> None:
    """Set `values` in `config`, refusing unknown keys and other types; a duration may change its unit."""
    for key, value in values.items():
        key = str(key)
        name, (stem, _, unit) = prefix + key, key.rpartition("_")
        others = [f"{stem}_{u}" for u in UNITS if unit in UNITS and f"{stem}_{u}" in config]
        if key not in config and others:
            for other in others:
                if other not in values:
                    del config[other]
            config[key] = 0.0
        if key not in config:
            raise InputError(f"{source}: no config field {name}{near_match(key, config.keys())}")
        if isinstance(config[key], ConfigDict) and isinstance(value, dict):
            _override(config[key], value, source, name + ".")
            continue
        try:
            if value is not None:
                config[key] = _leaf(value)
            elif config[key] is not None:
                config[key] = placeholder(type(config[key]))
        except TypeError:
            wanted = type(config[key]).__name__
            raise InputError(f"{source}: {name} is {value!r}; give a value of type {wanted}") from None


def _leaf(value: Any) -> Any:
    """Turn what data files can hold into what Python configs hold: tuples for lists, placeholders for nulls."""
    if isinstance(value, dict):
        return {key: _leaf(item) for key, item in value.items()}
    if value is None:
        return placeholder(str)
    return tuple(_leaf(item) for item in value) if isinstance(value, list) else value


def near_match(key: str, known: Any) -> str:
    """Return '; did you mean X?' for the closest of `known`, or a list of all."""
    close = difflib.get_close_matches(key, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(sorted(known))}"


def leaves(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Return {"a.b": value} for every leaf."""
    flat = {}
    for key in config.keys():
        value = config[key]
        if isinstance(value, ConfigDict):
            flat |= leaves(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def check_config(config: ConfigDict) -> None:
    """Refuse a config with a leaf that nobody set or a duration in two units.

    Raises:
        InputError: naming the field, and the flag that sets it.
    """
    flat = leaves(config)
    for name, value in flat.items():
        if value is None:
            raise InputError(f"{name} is not set; pass --config.{name}=VALUE")
        stem, _, unit = name.rpartition("_")
        given = [f"{stem}_{u}" for u in UNITS if f"{stem}_{u}" in flat]
        if unit in UNITS and len(given) > 1:
            raise InputError(f"{' and '.join(given)} are both set; keep one of them")


def duration_steps(
    spec: ConfigDict, name: str, batch_size: int, steps_per_epoch: int | None, total_steps: int | None
) -> int:
    """Return the duration `name_steps`, `name_epochs`, `name_examples` or `name_percent` of `spec` in steps.

    `steps_per_epoch` is None for endless data and `total_steps` is None for the total itself.

    Raises:
        InputError: the unit is missing, or has no meaning here.
    """
    units = [unit for unit in UNITS if f"{name}_{unit}" in spec]
    if len(units) != 1:
        raise InputError(f"give exactly one of {', '.join(f'{name}_{unit}' for unit in UNITS)}")
    field, value = f"{name}_{units[0]}", spec[f"{name}_{units[0]}"]
    if value < 0:
        raise InputError(f"{field} is {value}; give a positive number")
    if units[0] == "epochs" and steps_per_epoch is None:
        raise InputError(f"{field}: synthetic music has no epochs; give {name}_steps or {name}_examples")
    if units[0] == "percent" and total_steps is None:
        raise InputError(f"{field}: a percentage of nothing; give {name}_steps")
    scale = {
        "steps": 1,
        "epochs": steps_per_epoch,
        "examples": 1 / batch_size,
        "percent": (total_steps or 0) / 100,
    }[units[0]]
    return max(1, round(value * scale))


def changed_fields(old: dict[str, Any], config: ConfigDict) -> list[str]:
    """Return 'field: old -> new' for each leaf by which `config` would make another run than the saved `old` did."""
    before, after = leaves(ConfigDict(_leaf(old))), leaves(config)
    return [
        f"{name}: {before.get(name)} -> {after.get(name)}"
        for name in sorted(before | after)
        if before.get(name) != after.get(name) and not name.startswith(FREE_FIELDS)
    ]


def save(config: ConfigDict, path: epath.Path) -> None:
    """Write the resolved config as JSON, lists for tuples, atomically."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(json.dumps(config.copy_and_resolve_references().to_dict(), indent=2) + "\n")
    partial.replace(path)
