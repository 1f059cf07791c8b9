"""Where a checkpoint's files come from."""

import pytest

from smolpost.errors import UserError
from smolpost.model.loading import local_folder


def test_a_folder_is_itself(tmp_path):
    assert local_folder(str(tmp_path), "main") == tmp_path


def test_a_hub_id_without_network_is_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as error:
        local_folder("nobody/no-such-model", "v1")
    text = str(error.value)
    assert (
        text.startswith("checkpoint nobody/no-such-model@v1 is no folder and cannot be fetched (") and "\n" not in text
    )
    assert text.endswith("give a folder as model.checkpoint=FOLDER, or fetch it where there is a network")
