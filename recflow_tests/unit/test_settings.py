from datetime import date
from pathlib import Path

import pytest

from recflow.core.errors import ConfigError
from recflow.hardware.catalogue import load_catalogue
from recflow.quality.trigger import TriggerPolicy
from recflow.settings import Settings, load_settings


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("RECFLOW_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def test_defaults_describe_the_sample() -> None:
    settings = load_settings()
    assert settings.source == "simulated"
    assert (settings.source_dir / "behaviors.tsv").is_file()
    assert settings.mlflow_uri.startswith("sqlite:///")


def test_environment_wins_over_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("RECFLOW_WINDOW_DAYS=9\nRECFLOW_SEED=4\nOTHER=1\n")
    monkeypatch.setenv("RECFLOW_SEED", "5")
    settings = load_settings()
    assert (settings.window_days, settings.seed) == (9, 5)


def test_env_file_round_trip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = load_settings(
        source="mind", last_day=date(2026, 1, 20), home=tmp_path / "a b", source_dir=tmp_path
    )
    file = tmp_path / "recflow.env"
    file.write_text(settings.to_env())
    monkeypatch.setenv("RECFLOW_ENV_FILE", str(file))
    assert load_settings() == settings


def test_the_base_model_is_a_folder_or_a_model_of_the_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "encoder").mkdir()
    assert load_settings(base_model=Path("encoder")).base_model == str(tmp_path / "encoder")
    monkeypatch.setenv("RECFLOW_BASE_MODEL", "encoder")
    assert load_settings().base_model == str(tmp_path / "encoder")
    # No folder has this name, so the hub is asked for it, when a step needs it.
    monkeypatch.setenv("RECFLOW_BASE_MODEL", "intfloat/multilingual-e5-small")
    settings = load_settings()
    assert settings.base_model == "intfloat/multilingual-e5-small"
    file = tmp_path / "recflow.env"
    file.write_text(settings.to_env())
    monkeypatch.delenv("RECFLOW_BASE_MODEL")
    assert load_settings(file) == settings


def test_everything_written_is_below_the_home_folder(tmp_path: Path) -> None:
    settings = load_settings(home=tmp_path)
    places = {
        settings.store_dir,
        settings.cache_dir,
        settings.checkpoints_dir,
        settings.studies_dir,
    }
    assert {place.parent for place in places} == {tmp_path}
    assert len(places) == 4


def test_env_file_that_is_named_must_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECFLOW_ENV_FILE", "nowhere.env")
    with pytest.raises(ConfigError, match=r"RECFLOW_ENV_FILE = 'nowhere.env'.*existing file"):
        load_settings()


@pytest.mark.parametrize("where", ["environment", "file"])
def test_unknown_keys_are_errors(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str
) -> None:
    if where == "file":
        (tmp_path / ".env").write_text("RECFLOW_WINDOWDAYS=9\n")
    else:
        monkeypatch.setenv("RECFLOW_WINDOWDAYS", "9")
    with pytest.raises(
        ConfigError, match=r"unknown setting RECFLOW_WINDOWDAYS.*RECFLOW_WINDOW_DAYS"
    ):
        load_settings()


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("RECFLOW_SOURCE", "csv", "'simulated', 'mind', 'ebnerd' or 'movielens'"),
        ("RECFLOW_WINDOW_DAYS", "-1", "greater than or equal to 3"),
        ("RECFLOW_WINDOW_DAYS", "soon", "valid integer"),
        ("RECFLOW_MAX_HISTORY", "0", "greater than or equal to 1"),
        ("RECFLOW_TIMEZONE", "Mars/Olympus", "IANA time zone"),
        ("RECFLOW_FIRST_DAY", "2026-13-01", "date"),
        ("RECFLOW_NIGHTLY_HOUR", "24", "less than or equal to 23"),
        ("RECFLOW_RETRAIN_DAYS_NEEDED", "0", "greater than or equal to 1"),
        ("RECFLOW_RETRAIN_DAYS_LOOKED_AT", "31", "less than or equal to 30"),
        ("RECFLOW_RETRAIN_COOLDOWN_DAYS", "-1", "greater than or equal to 0"),
        ("RECFLOW_RETRAIN_DECAY_AT_ONCE", "often", "boolean"),
        ("RECFLOW_WEB_URL", "localhost:3000", "begins with http:// or https://"),
        ("RECFLOW_WEB_URL", "http://[::1", "begins with http:// or https://"),
    ],
)
def test_impossible_values_name_key_value_and_what_is_allowed(
    monkeypatch: pytest.MonkeyPatch, key: str, value: str, says: str
) -> None:
    monkeypatch.setenv(key, value)
    with pytest.raises(ConfigError) as error:
        load_settings()
    assert key in str(error.value)
    assert repr(value) in str(error.value)
    assert says in str(error.value)


def test_splits_must_leave_a_day_to_train_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECFLOW_WINDOW_DAYS", "3")
    monkeypatch.setenv("RECFLOW_TEST_DAYS", "2")
    with pytest.raises(ConfigError, match="leave no day of window_days 3 to train on"):
        load_settings()


def test_the_policy_of_retraining_is_checked_when_it_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert load_settings().trigger_policy == TriggerPolicy(2, 3, 0, True)
    monkeypatch.setenv("RECFLOW_RETRAIN_DAYS_NEEDED", "5")
    with pytest.raises(ConfigError, match=r"RECFLOW_RETRAIN_DAYS_NEEDED = 5 .*LOOKED_AT = 3"):
        load_settings()
    monkeypatch.setenv("RECFLOW_RETRAIN_DAYS_LOOKED_AT", "7")
    monkeypatch.setenv("RECFLOW_RETRAIN_COOLDOWN_DAYS", "0")
    monkeypatch.setenv("RECFLOW_RETRAIN_DECAY_AT_ONCE", "false")
    assert load_settings().trigger_policy == TriggerPolicy(5, 7, 0, False)


@pytest.mark.parametrize(
    "value", ["ftp://host/t0ken", "t0ken", "https:///t0ken", "http://h:x/t0ken"]
)
def test_the_webhook_is_an_address_that_no_message_shows(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("RECFLOW_ALERT_WEBHOOK", value)
    with pytest.raises(ConfigError, match=r"RECFLOW_ALERT_WEBHOOK .*https://") as error:
        load_settings()
    assert "t0ken" not in str(error.value)
    monkeypatch.setenv("RECFLOW_ALERT_WEBHOOK", "https://hooks.example/t0ken")
    settings = load_settings()
    assert settings.alert_webhook == "https://hooks.example/t0ken"
    assert "t0ken" not in repr(settings)


def test_last_day_before_first_day_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECFLOW_FIRST_DAY", "2026-02-01")
    monkeypatch.setenv("RECFLOW_LAST_DAY", "2026-01-01")
    with pytest.raises(ConfigError, match="before first_day"):
        load_settings()


def test_settings_cannot_change(tmp_path: Path) -> None:
    settings: Settings = load_settings()
    with pytest.raises(ValueError, match="frozen"):
        settings.seed = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_devices_are_of_the_catalogue_and_one_of_them_has_no_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    processors = next(d.name for d in load_catalogue().values() if not d.is_gpu)
    monkeypatch.setenv("RECFLOW_DEVICES", f"t4, {processors}")
    assert load_settings().device_names == ("t4", processors)
    monkeypatch.setenv("RECFLOW_DEVICES", f"t5,{processors}")
    with pytest.raises(ConfigError, match=r"RECFLOW_DEVICES = .*'t5' is no device.*allowed: .*t4"):
        load_settings()
    monkeypatch.setenv("RECFLOW_DEVICES", "t4")
    with pytest.raises(ConfigError, match=f"run on processors; allowed: .*{processors}"):
        load_settings()


def test_files_of_devices_and_measurements_must_exist(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RECFLOW_HOME", str(tmp_path))
    assert load_settings().calibration_file is None
    (tmp_path / "machine.json").write_text("{}")
    assert load_settings().calibration_file == tmp_path / "machine.json"
    for name in ("RECFLOW_CATALOGUE", "RECFLOW_CALIBRATION"):
        with monkeypatch.context() as context:
            context.setenv(name, str(tmp_path / "missing"))
            with pytest.raises(ConfigError, match=f"{name} = .*missing.*allowed: an existing file"):
                load_settings()


def test_the_candidate_is_a_model_of_the_family(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert load_settings().candidate == "fine_tuned"
    monkeypatch.setenv("RECFLOW_CANDIDATE", "half")
    assert load_settings().candidate == "half"
    family = tmp_path / "family.toml"
    family.write_text('[small]\nparent = "fine_tuned"\nstep = "trim"\n')
    monkeypatch.setenv("RECFLOW_FAMILY", str(family))
    with pytest.raises(
        ConfigError, match=r"RECFLOW_CANDIDATE = 'half' .*allowed: fine_tuned, small$"
    ):
        load_settings()


def test_approvals_are_automatic_or_required(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings().approval == "automatic"
    monkeypatch.setenv("RECFLOW_APPROVAL", "sometimes")
    with pytest.raises(ConfigError, match=r"RECFLOW_APPROVAL = 'sometimes' .*'automatic' or"):
        load_settings()


def test_names_that_mlflow_refuses_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECFLOW_REGISTERED_MODEL", "a/b")
    with pytest.raises(ConfigError, match="RECFLOW_REGISTERED_MODEL = 'a/b'"):
        load_settings()
