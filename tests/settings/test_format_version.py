import json
import warnings
from importlib.metadata import version

import pytest
from conftest import build_adapter, build_model
from peft import PeftModel

from axolotl_reft import LoreftConfig
from axolotl_reft.saved.directory import read_adapter_config
from axolotl_reft.settings.config_file import FORMAT_VERSION


@pytest.fixture
def saved(tmp_path):
    build_adapter(build_model()).save_pretrained(tmp_path)
    return tmp_path / "adapter_config.json"


def change(file, **settings):
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_an_adapter_says_what_saved_it(saved):
    settings = json.loads(saved.read_text())
    assert settings["format_version"] == FORMAT_VERSION
    assert settings["axolotl_reft_version"] == version("axolotl-reft")


def test_what_is_saved_again_is_saved_by_this_version(saved):
    change(saved, axolotl_reft_version="0.0.1")
    config = LoreftConfig.from_pretrained(str(saved.parent))
    assert config.axolotl_reft_version == "0.0.1"
    config.save_pretrained(str(saved.parent))
    settings = json.loads(saved.read_text())
    assert settings["axolotl_reft_version"] == version("axolotl-reft")


def test_an_adapter_from_before_formats_is_read(saved):
    settings = json.loads(saved.read_text())
    del settings["format_version"], settings["axolotl_reft_version"]
    saved.write_text(json.dumps(settings))
    assert read_adapter_config(str(saved.parent), "DIR").format_version == 1


def test_a_newer_format_stops_before_unknown_keys_are_dropped(saved):
    change(saved, format_version=2, axolotl_reft_version="9.0", novelty=1)
    message = r"format_version 2 \(saved by axolotl-reft 9.0\).* up to 1; upgrade axolo"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(build_model(), saved.parent)
        with pytest.raises(
            ValueError, match=f"^DIR: .* readable adapter in .*{message}"
        ):
            read_adapter_config(str(saved.parent), "DIR")


@pytest.mark.parametrize("number", ["1", 0, 1.5, True, None])
def test_what_is_no_format(saved, number):
    change(saved, format_version=number)
    with pytest.raises(ValueError, match="format_version: .* is not a whole number"):
        read_adapter_config(str(saved.parent), "DIR")
