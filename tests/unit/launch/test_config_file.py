"""A configuration file says exactly what is meant, or is refused with what to change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from launch.config_file import config_schema, known_keys, load_config, show
from launch.config_reference import reference
from tprt.errors import ConfigError

Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], str]:
    def write_text(text: str) -> str:
        file = tmp_path / "deployment.yaml"
        file.write_text(text)
        return str(file)

    return write_text


def refusal(path: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    return str(error.value)


def test_what_is_not_given_has_its_default(write: Write) -> None:
    config = load_config(write("model: {path: m}"))
    assert config.model.path == "m"
    assert config.parallel.tensor_parallel_size == 1
    assert config.cache.enable_prefix_caching is True


def test_an_override_wins_and_the_last_one_wins_over_all(write: Write) -> None:
    path = write("model: {path: m}\nparallel: {tensor_parallel_size: 2}")
    config = load_config(
        path,
        [
            "parallel.tensor_parallel_size=4",
            "parallel.tensor_parallel_size=3",
            "parallel.rank_weights=[80, 80, 48]",
            "model.max_model_len=null",
        ],
    )
    assert config.parallel.tensor_parallel_size == 3
    assert config.parallel.rank_weights == (80, 80, 48)


def test_an_unknown_key_is_refused_with_file_path_and_the_nearest_known_key(write: Write) -> None:
    path = write("model: {path: m}\nscheduler: {max_num_sequences: 3}")
    assert refusal(path) == (
        f"{path}: there is no setting scheduler.max_num_sequences; did you mean scheduler.max_num_seqs?"
    )


def test_a_key_in_the_wrong_section_is_refused_with_the_right_one(write: Write) -> None:
    assert "did you mean cache.block_size?" in refusal(write("model: {path: m, block_size: 3}"))


def test_an_unknown_section_is_refused(write: Write) -> None:
    assert "there is no setting paralel; did you mean parallel?" in refusal(
        write("model: {path: m}\nparalel: {}")
    )


def test_every_problem_is_listed_with_its_own_source(write: Write) -> None:
    path = write("model: {dtype: float8}\ncache: {block_size: none}")
    lines = refusal(path, "server.port=99999").splitlines()
    assert lines[0] == f"{path}: model.path is missing; it must be given"
    assert f"{path}: model.dtype is 'float8'" in lines[1]
    assert f"{path}: cache.block_size is 'none'" in lines[2]
    assert "--set server.port=99999: server.port is 99999" in lines[3]


def test_a_problem_is_laid_at_the_override_that_made_it(write: Write) -> None:
    path = write("model: {path: m, dtype: float8}")
    lines = refusal(path, "paralel.rank_weights=[1]", "cache.block_size=x", "model.load_format=x").splitlines()
    assert sorted(line.partition(": ")[0] for line in lines) == [
        "--set cache.block_size=x",
        "--set model.load_format=x",
        "--set paralel.rank_weights=[1]",
        path,
    ]


def test_an_override_of_a_whole_section_forgets_what_was_set_in_it_before(write: Write) -> None:
    path = write("model: {path: m}")
    config = load_config(path, ["cache.block_size=none", "cache={num_blocks: 8}"])
    assert config.cache.num_blocks == 8
    assert refusal(path, "cache.block_size=8", "cache={block_size: x}") == (
        "--set cache={block_size: x}: cache.block_size is 'x'; input should be a valid integer"
    )


@pytest.mark.parametrize("value", ["yes", "'80'", "80.5", "80.0", "null", "[80]", "{a: 1}", "0x1_0000"])
def test_a_number_is_a_number_within_its_bounds_and_nothing_that_looks_like_one(
    write: Write, value: str
) -> None:
    path = write("model: {path: m}")
    assert refusal(path, f"server.port={value}").startswith(f"--set server.port={value}: server.port is ")
    assert load_config(path, ["server.port=80"]).server.port == 80


@pytest.mark.parametrize("value", [".nan", ".inf", "1000001", "0", "-1", "yes", "'3'"])
def test_a_deadline_is_a_positive_number_of_seconds_that_the_kernel_can_count(write: Write, value: str) -> None:
    path = write("model: {path: m}")
    assert "supervision.step_timeout_s is " in refusal(path, f"supervision.step_timeout_s={value}")
    assert load_config(path, ["supervision.step_timeout_s=3"]).supervision.step_timeout_s == 3.0


@pytest.mark.parametrize("key", ["cache.cpu_memory_gib", "supervision.restart_window_s"])
def test_what_has_no_upper_bound_is_finite(write: Write, key: str) -> None:
    assert f"{key} is inf; input should be a finite number" in refusal(write("model: {path: m}"), f"{key}=.inf")


def test_settings_that_contradict_each_other_are_refused(write: Write) -> None:
    path = write("model: {path: m}\nscheduler: {max_num_seqs: 9, max_num_batched_tokens: 8}")
    assert "max_num_batched_tokens 8 is less than max_num_seqs 9" in refusal(path)
    assert "rank_weights has 1 entries for tensor_parallel_size 2" in refusal(
        write("model: {path: m}"), "parallel.tensor_parallel_size=2", "parallel.rank_weights=[1]"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds nothing; expected sections"),
        ("- a\n- b", "holds list; expected sections"),
        ("model: {path: m}\nmodel: {path: n}", "line 2: key 'model' is given twice"),
        ("model: {path: m, path: n}", "line 1: key 'path' is given twice"),
        ("1: 2", "line 1: key 1 is no text"),
        ("model: {path: m\nx", "line 2: while parsing a flow mapping, expected"),
        ("model: {path: m}\n---\na: 1", "line 2: expected a single document"),
        ("model: {path: \0}", "special characters are not allowed"),
        ("model: &m {path: *m}", "line 1: *m is an alias; write the value out"),
        ("&all {model: *all}", "line 1: *all is an alias; write the value out"),
        ("model: 3", "model is 3; expected settings such as model.path"),
        ("model: {path: m}\nserver:", "server is empty; expected settings such as server.host"),
        ("model: !!python/object/apply:os.system [true]", "line 1"),
        ("model:\n  path: 2024-13-45", "line 2: 2024-13-45 cannot be read (month must be in 1..12)"),
        ("cache: {num_blocks: 0x_}", "line 1: 0x_ cannot be read"),
    ],
)
def test_a_file_that_is_no_deployment_is_refused_with_its_line(write: Write, text: str, message: str) -> None:
    path = write(text)
    assert refusal(path).startswith(path)
    assert message in refusal(path)


def test_a_file_that_is_not_there_is_named() -> None:
    assert refusal("/nowhere.yaml") == "there is no file /nowhere.yaml; expected the YAML file of a deployment"


@pytest.mark.parametrize(
    "override",
    ["model.path", "=3", "model..path=3", "model.path.x=3", "model.path=[1", "model.path=2024-13-45"],
)
def test_an_override_that_cannot_be_read_is_quoted(write: Write, override: str) -> None:
    assert override.partition("=")[0] in refusal(write("model: {path: m}"), override)


def test_what_is_shown_loads_back_to_the_same_settings(write: Write, tmp_path: Path) -> None:
    config = load_config(
        write("model: {path: m}"), ["parallel.tensor_parallel_size=2", "parallel.rank_weights=[1, 2]"]
    )
    (tmp_path / "shown.yaml").write_text(show(config))
    assert load_config(str(tmp_path / "shown.yaml")) == config


def test_every_setting_says_what_it_means() -> None:
    schema = config_schema()
    described = {
        f"{section}.{name}"
        for section, ref in schema["properties"].items()
        for name, field in schema["$defs"][ref["$ref"].rpartition("/")[2]]["properties"].items()
        if field.get("description")
    }
    assert described == {key for key in known_keys() if "." in key}


def test_the_reference_page_is_up_to_date() -> None:
    page = Path("docs/configuration.md").read_text()
    assert page == reference(), "write it again: tprt config reference > docs/configuration.md"
