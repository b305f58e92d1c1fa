"""A secret of the spec's environment reaches the trainer and stands in no file."""

import pytest

from polycom_ext.runs.secrets import is_secret, masked


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        ("WANDB_API_KEY", "x", True),
        ("AWS_SECRET_ACCESS_KEY", "x", True),
        ("hf_token", "x", True),
        ("PGPASSWORD", "x", True),
        ("REDIS_AUTH", "x", True),
        ("HTTPS_PROXY", "http://me:hunter2@proxy:3128", True),
        ("HTTPS_PROXY", "http://proxy:3128", False),
        ("TOKENIZERS_PARALLELISM", "false", False),
        ("SSH_AUTH_SOCK", "/tmp/agent", False),
        ("OMP_NUM_THREADS", "1", False),
        ("PWD", "/tmp", False),
    ],
)
def test_a_secret_is_known_by_its_name_or_by_the_login_in_it(name: str, value: str, secret: bool) -> None:
    assert is_secret(name, value) is secret
    assert masked({name: value}) == {name: f"${{{name}}}" if secret else value}
