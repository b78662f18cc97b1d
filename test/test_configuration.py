"""configuration.py: arguments, files, bases, flags, durations and the comparison of a rerun with its run."""

import json
import pathlib

import pytest
from etils import epath
from ml_collections import ConfigDict

from meanflow_audio_codec import configuration
from meanflow_audio_codec.configuration import (
    changed_fields,
    check_config,
    duration_steps,
    leaves,
    load_config,
    override_from_flags,
    parse_arg,
    save,
)
from meanflow_audio_codec.errors import InputError

REAL = pathlib.Path(__file__).parents[1] / "configs" / "meanflow_mdct.py"

SMALL = """
from ml_collections import ConfigDict, config_dict
from meanflow_audio_codec.configuration import parse_arg

def get_config(arg=None):
    arg = parse_arg(arg, size=8, variant="Ti", rate=0.5, runlocal=False)
    config = ConfigDict({"seed": 0, "total_steps": 60 if arg.runlocal else 1000, "log_steps": 10, "resume": ""})
    config.input = ConfigDict({"batch_size": arg.size, "gain_db": (-6.0, 6.0), "polarity": True})
    config.input.data_dir = config_dict.placeholder(str)
    config.model = ConfigDict({"variant": arg.variant})
    config.optimizer = ConfigDict({"lr": 1e-3, "warmup_steps": 5})
    config.evals = ConfigDict({"samples": {"every_steps": 100, "nfe": (1, 2)}})
    return config.lock()
"""


@pytest.fixture
def folder(tmp_path):
    """A folder with small.py, and a writer of other configs into it: `write(name, text or values) -> path`."""

    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    write("small.py", SMALL)
    return write


@pytest.fixture
def small(folder, tmp_path):
    return load_config(str(tmp_path / "small.py"))


def based(folder, **values):
    """Load a file of `values` over small.py."""
    return load_config(folder("mine.json", {"base": "small.py"} | values))


# --- arguments


def test_arguments_take_the_types_of_their_defaults():
    arg = parse_arg("size=12,variant=S,rate=2,runlocal", size=8, variant="Ti", rate=0.5, runlocal=False, more=True)
    assert arg.to_dict() == {"size": 12, "variant": "S", "rate": 2.0, "runlocal": True, "more": True}
    assert type(arg.rate) is float
    assert parse_arg("runlocal=false,more=TRUE", runlocal=True, more=False).to_dict() == {
        "runlocal": False,
        "more": True,
    }
    assert parse_arg("url=a=b,", url="").url == "a=b"


@pytest.mark.parametrize("arg", [None, ""])
def test_no_arguments_are_the_defaults(arg):
    assert parse_arg(arg, size=8).to_dict() == {"size": 8}


@pytest.mark.parametrize(
    ("arg", "words"),
    [
        ("sise=3", ("'sise' is unknown", "did you mean size?")),
        ("zzz=3", ("'zzz' is unknown", "known: rate, runlocal, size")),
        ("size=big", ("size=big", "type int")),
        ("size=1.5", ("size=1.5", "type int")),
        ("size", ("size needs a value",)),
        ("rate=fast", ("rate=fast", "type float")),
        ("runlocal=yes", ("runlocal=yes", "true or false")),
        ("runlocal=", ("runlocal=", "true or false")),
    ],
)
def test_wrong_argument(arg, words):
    with pytest.raises(InputError) as error:
        parse_arg(arg, size=8, rate=0.5, runlocal=False)
    assert all(word in str(error.value) for word in words), error.value


def test_a_bare_key_needs_a_bool():
    with pytest.raises(InputError):
        parse_arg("variant", variant="Ti")


# --- files


def test_python_file_with_arguments(folder, tmp_path):
    config = load_config(f"{tmp_path / 'small.py'}:size=3,runlocal")
    assert (config.input.batch_size, config.total_steps) == (3, 60)
    assert config.is_locked


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("one.json", '{"seed": 3, "input": {"gain_db": [-1.5, 2.0]}, "optimizer": {"lr": 0.001}}'),
        ("one.yaml", "seed: 3\ninput: {gain_db: [-1.5, 2.0]}\noptimizer:\n  lr: 0.001\n"),
        ("one.yml", "seed: 3\ninput: {gain_db: [-1.5, 2.0]}\noptimizer:\n  lr: 1.0e-3\n"),
    ],
)
def test_data_files_stand_alone(folder, name, text):
    config = load_config(folder(name, text))
    assert leaves(config) == {"seed": 3, "input.gain_db": (-1.5, 2.0), "optimizer.lr": 1e-3}
    assert config.is_locked


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("bad.yaml", "a: [1", ("bad.yaml", "cannot be read")),
        ("bad.json", '{"a": ', ("bad.json", "cannot be read")),
        ("list.yaml", "- 1\n- 2\n", ("list.yaml", "no mapping")),
        ("empty.yaml", "", ("empty.yaml", "no mapping")),
        ("config.toml", "a = 1", ("config.toml", ".py, .json or .yaml")),
    ],
)
def test_a_file_that_is_no_config(folder, name, text, words):
    with pytest.raises(InputError) as error:
        load_config(folder(name, text))
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_no_such_file(tmp_path):
    with pytest.raises(InputError, match="no file .*none.py"):
        load_config(str(tmp_path / "none.py"))
    with pytest.raises(InputError, match="no file"):
        load_config(str(tmp_path))


def test_arguments_of_a_data_file_are_refused(folder):
    with pytest.raises(InputError):
        load_config(folder("mine.json", {"base": "small.py"}) + ":runlocal")


# --- bases


def test_base_is_found_beside_the_file_whatever_the_working_directory(folder, tmp_path, monkeypatch):
    path = folder("deep/mine.yaml", "base: ../small.py\noptimizer: {lr: 2.0e-4}\n")
    monkeypatch.chdir(tmp_path.parent)
    config = load_config(path)
    assert config.optimizer.lr == 2e-4
    assert config.optimizer.warmup_steps == 5  # not replaced: groups merge
    assert config.is_locked and "base" not in config


def test_base_with_arguments_and_by_its_whole_path(folder, tmp_path):
    config = load_config(folder("mine.json", {"base": f"{tmp_path / 'small.py'}:size=5,runlocal", "seed": 7}))
    assert (config.input.batch_size, config.total_steps, config.seed) == (5, 60, 7)


def test_base_of_a_base(folder):
    folder("first.yaml", "base: small.py:variant=S\nseed: 1\noptimizer: {lr: 0.5}\n")
    config = load_config(folder("deep/second.json", {"base": "../first.yaml", "seed": 2}))
    assert (config.model.variant, config.seed, config.optimizer.lr) == ("S", 2, 0.5)


def test_missing_base_is_named(folder):
    with pytest.raises(InputError, match="none.py"):
        load_config(folder("mine.json", {"base": "none.py"}))


def test_real_config_as_base_takes_every_kind_of_leaf(folder):
    values = {"base": f"{REAL}:runlocal", "evals": {"samples": {"nfe": [1]}}, "tokens": {"exponent": 1}}
    config = load_config(folder("mine.json", values))
    assert config.evals.samples.nfe == (1,)
    assert config.tokens.exponent == 1.0
    check_config(config)


# --- overrides in a file


def test_overrides_keep_types(folder):
    config = based(
        folder,
        seed=3,
        input={"gain_db": [-1.0, 1.0], "polarity": False, "data_dir": "music"},
        optimizer={"lr": 1},
        evals={"samples": {"nfe": [4]}},
    )
    assert config.input.gain_db == (-1.0, 1.0) and config.evals.samples.nfe == (4,)
    assert config.input.polarity is False and config.input.data_dir == "music"
    assert type(config.optimizer.lr) is float and config.optimizer.lr == 1.0  # a float may be given as an int


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"seed": 1.5}, ("seed is 1.5", "int")),  # but an int not as a float
        ({"seed": "3"}, ("seed is '3'", "int")),
        ({"optimizer": {"lr": "fast"}}, ("optimizer.lr is 'fast'", "float")),
        ({"input": {"polarity": 1}}, ("input.polarity is 1", "bool")),
        ({"input": {"gain_db": 3}}, ("input.gain_db is 3", "tuple")),
        ({"model": {"variant": 3}}, ("model.variant is 3", "str")),
        ({"input": 3}, ("input is 3",)),
        ({"seed": {"a": 1}}, ("seed is {'a': 1}", "int")),
        ({"sed": 1}, ("no config field sed", "did you mean seed?")),
        ({"optimizer": {"lrr": 1.0}}, ("no config field optimizer.lrr", "did you mean lr?")),
        ({"optimizer": {"zzz": 1.0}}, ("no config field optimizer.zzz", "known: lr, warmup_steps")),
        ({"learning_epochs": 1.0}, ("no config field learning_epochs",)),
    ],
)
def test_wrong_override(folder, values, words):
    with pytest.raises(InputError) as error:
        based(folder, **values)
    assert all(word in str(error.value) for word in ("mine.json", *words)), error.value


def test_a_file_may_change_the_unit_of_a_duration(folder):
    config = based(folder, total_epochs=3, optimizer={"warmup_percent": 2.5}, evals={"samples": {"every_examples": 64}})
    assert "total_steps" not in config and config.total_epochs == 3
    assert dict(config.optimizer) == {"lr": 1e-3, "warmup_percent": 2.5}
    assert "every_steps" not in config.evals.samples
    folder("more.json", {"base": "mine.json", "total_examples": 500})
    config = load_config(str(pathlib.Path(folder("last.json", {"base": "more.json"}))))
    assert config.total_examples == 500 and "total_epochs" not in config


def test_exponents_without_a_dot(folder):
    assert load_config(folder("mine.yaml", "base: small.py\noptimizer: {lr: 1e-4}\n")).optimizer.lr == 1e-4


def test_two_units_in_a_file_are_both_kept_for_check_config_to_refuse(folder):
    config = based(folder, total_steps=5, total_epochs=1, input={"data_dir": ""})
    with pytest.raises(InputError, match="total_steps and total_epochs are both set"):
        check_config(config)


# --- flags


def test_flags_are_typed_by_the_old_values(small):
    flags = ["seed=3", "optimizer.lr=1", "input.gain_db=(-1.0, 1.0)", "input.polarity=false", "evals.samples.nfe=(4,)"]
    config = override_from_flags(small, [f"--config.{flag}" for flag in flags])
    assert (config.seed, config.optimizer.lr, config.input.gain_db) == (3, 1.0, (-1.0, 1.0))
    assert type(config.optimizer.lr) is float and config.input.polarity is False and config.evals.samples.nfe == (4,)
    assert config.is_locked


def test_without_flags_nothing_changes(small):
    before = leaves(small)
    assert leaves(override_from_flags(small, [])) == before


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--config.optimizer.lrr=1", ("optimizer.lrr", "did you mean optimizer.lr?")),
        ("--config.optimizer=1", ("optimizer",)),
        ("--config.seed=1.5", ("seed=1.5",)),
        ("--config.seed=many", ("seed=many",)),
        ("--config.optimizer.lr=fast", ("optimizer.lr=fast",)),
        ("--config.input.polarity=maybe", ("input.polarity=maybe",)),
        ("--config.learning_epochs=3", ("learning_epochs", "no such config field")),
        ("--verbose", ("unknown argument --verbose", "--config.FIELD=VALUE")),
        ("3", ("unknown argument 3",)),
    ],
)
def test_wrong_flag(small, flag, words):
    with pytest.raises(InputError) as error:
        override_from_flags(small, [flag])
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


@pytest.mark.parametrize("unit", ["epochs", "examples", "percent"])
def test_a_flag_may_change_the_unit_of_a_duration(small, unit):
    config = override_from_flags(small, [f"--config.optimizer.warmup_{unit}=1.5", "--config.seed=2"])
    assert dict(config.optimizer) == {"lr": 1e-3, f"warmup_{unit}": 1.5}
    assert config.seed == 2


def test_two_units_by_flags_are_refused(small):
    flags = ["--config.total_steps=5", "--config.total_epochs=1", "--config.input.data_dir=x"]
    with pytest.raises(InputError, match="both set"):
        check_config(override_from_flags(small, flags))


@pytest.mark.parametrize("field", ["seed.foo", "optimizer.lr.foo"])
def test_a_field_below_a_leaf_is_refused(small, field):
    with pytest.raises(InputError):
        override_from_flags(small, [f"--config.{field}=1"])


# --- what the user must give


def test_placeholder_is_refused_until_a_flag_sets_it(small):
    with pytest.raises(InputError, match=r"input.data_dir is not set; pass --config.input.data_dir=VALUE"):
        check_config(small)
    config = override_from_flags(small, ["--config.input.data_dir=~/music"])
    check_config(config)
    assert config.input.data_dir == "~/music"


@pytest.mark.parametrize("field", ["seed", "optimizer.lr"])
def test_null_in_a_file_can_be_set_by_the_flag_that_the_error_names(folder, field):
    values = {"seed": None} if field == "seed" else {"optimizer": {"lr": None}}
    assert leaves(override_from_flags(based(folder, **values), [f"--config.{field}=3"]))[field] == 3


def test_placeholder_of_a_base_can_still_be_set_by_its_flag(folder):
    config = override_from_flags(based(folder, seed=1), ["--config.input.data_dir=there"])
    assert config.input.data_dir == "there"


def test_placeholder_of_a_base_keeps_its_type(folder):
    with pytest.raises(InputError):
        based(folder, input={"data_dir": 3})


def test_check_config_accepts_what_is_complete():
    check_config(load_config(str(REAL)))
    check_config(load_config(f"{REAL}:runlocal"))


# --- durations


@pytest.mark.parametrize(
    ("field", "value", "steps"),
    [
        ("every_steps", 7, 7),
        ("every_epochs", 2.5, 250),
        ("every_examples", 800, 50),
        ("every_percent", 10, 40),
        ("every_examples", 1, 1),  # never 0
        ("every_epochs", 0.014, 1),
        ("every_percent", 0.4, 2),  # 1.6 rounds
    ],
)
def test_durations(field, value, steps):
    found = duration_steps(ConfigDict({field: value, "total_steps": 3}), "every", 16, 100, 400)
    assert found == steps and type(found) is int


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({}, ("every_steps, every_epochs, every_examples, every_percent",)),
        ({"every_steps": 1, "every_percent": 1}, ("exactly one",)),
        ({"every_steps": -1}, ("every_steps is -1",)),
        ({"every_epochs": 1}, ("every_epochs", "every_steps")),
        ({"every_percent": 1}, ("every_percent", "every_steps")),
    ],
)
def test_wrong_durations(spec, words):
    with pytest.raises(InputError) as error:
        duration_steps(ConfigDict(spec), "every", 16, None, None)
    assert all(word in str(error.value) for word in words), error.value


# --- a finished run, and its rerun


def saved(config, folder):
    """Save as a run does, and return the path."""
    path = epath.Path(folder("run/config.json", ""))
    save(config, path)
    return path


@pytest.mark.parametrize("arg", ["", ":runlocal,objective=mean_flow,tokens=reshape"])
def test_config_json_loads_and_is_the_same_run(folder, arg):
    config = load_config(f"{REAL}{arg}")
    path = saved(config, folder)
    old, reloaded = json.loads(path.read_text()), load_config(str(path))
    assert leaves(reloaded) == leaves(config)
    assert changed_fields(old, config) == changed_fields(old, reloaded) == []  # JSON has lists where we have tuples
    assert saved(reloaded, folder).read_text() == json.dumps(old, indent=2) + "\n"
    assert [file.name for file in path.parent.iterdir()] == ["config.json"]  # nothing half-written stays


def test_small_floats_survive_config_json(folder):
    config = override_from_flags(load_config(str(REAL)), ["--config.optimizer.lr=1e-5"])
    assert load_config(str(saved(config, folder))).optimizer.lr == 1e-5


def test_changed_fields_names_what_makes_another_run():
    config = load_config(str(REAL))
    old = config.to_dict()
    flags = ["optimizer.lr=0.5", "input.gain_db=(-6.0, 7.0)", "model.variant=S", "seed=1"]
    changed = changed_fields(old, override_from_flags(config, [f"--config.{flag}" for flag in flags]))
    assert changed == [
        "input.gain_db: (-6.0, 6.0) -> (-6.0, 7.0)",
        "model.variant: Ti -> S",
        "optimizer.lr: 0.003 -> 0.5",
        "seed: 0 -> 1",
    ]


def test_changed_fields_names_what_came_and_went():
    old = {"model": {"width": 1, "gone": 2}}
    assert changed_fields(old, ConfigDict({"model": {"width": 1, "new": 3}})) == [
        "model.gone: 2 -> None",
        "model.new: None -> 3",
    ]


@pytest.mark.parametrize(
    "flag",
    [
        *("total_steps=7", "total_epochs=2", "log_steps=3", "log_examples=3", "checkpoint_steps=2"),
        *("evals.samples.every_steps=5", "evals.samples.nfe=(1,)", "evals.reconstruction.autoencoder=there"),
        *("resume=there", "init_from=there", "input.read_threads=9"),
    ],
)
def test_changed_fields_leaves_free_fields_alone(flag):
    config = load_config(str(REAL))
    old = config.to_dict()
    assert changed_fields(old, override_from_flags(config, [f"--config.{flag}"])) == []


def test_save_resolves_references(folder):
    config = ConfigDict({"a": 1, "b": (1, 2)})
    config.c = config.get_ref("a")
    assert json.loads(saved(config, folder).read_text()) == {"a": 1, "b": [1, 2], "c": 1}


def test_near_match_or_all():
    assert configuration.near_match("lrr", ["lr", "wd"]) == "; did you mean lr?"
    assert configuration.near_match("zzz", ["wd", "lr"]) == "; known: lr, wd"


def test_json_may_be_indented_by_tabs(folder):
    assert load_config(folder("mine.json", '{\n\t"base": "small.py",\n\t"seed": 4\n}')).seed == 4


def test_a_new_unit_needs_a_number(folder):
    with pytest.raises(InputError):
        duration_steps(based(folder, total_epochs="many"), "total", 8, 10, None)


@pytest.mark.parametrize("value", [2, None])
def test_a_new_unit_in_a_file_is_a_float_as_by_flag(folder, value):
    config = based(folder, optimizer={"warmup_percent": value})
    assert override_from_flags(config, ["--config.optimizer.warmup_percent=2.5"]).optimizer.warmup_percent == 2.5


def test_null_over_a_placeholder_leaves_it(folder):
    config = override_from_flags(based(folder, input={"data_dir": None}), ["--config.input.data_dir=there"])
    assert config.input.data_dir == "there"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("itself.json", '{"base": "itself.json"}'),
        ("number.json", '{"base": 3}'),
        ("key.yaml", "base: small.py\n1: 2\n"),
        ("none.py", "x = 1\n"),
    ],
)
def test_a_file_that_is_no_config_either(folder, name, text):
    with pytest.raises(InputError, match=name):
        load_config(folder(name, text))
