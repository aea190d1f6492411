"""Credentials are in nothing that is stored or printed, and places of files in nothing that is
published.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from checkpoints.hub import publication, write
from checkpoints.pretrained import Provenance, save_pretrained
from checkpoints.provenance import command_line
from configs.command_line.loading import run
from configs.command_line.redaction import HIDDEN, at_home, portable, redact, redacted
from modules.drafters.heads.medusa import Medusa
from tests.fakes import tiny_target
from train.cli import command as train_command
from train.cli import make_parser, recipe_settings

WORD = "A1b2C3d4E5f6G7h8I9j0K1l2M3n4"
HEX = "0123456789abcdef0123456789abcdef01234567"
SECRETS = {
    "url": ("https://user:pa55word@host/data.jsonl", "pa55word"),
    "hub": ("python x.py --key hf_AbCdEfGhIjKlMnOpQrStUv", "hf_AbCdEfGhIjKlMnOpQrStUv"),
    "organisation": ("api_org_AbCdEfGhIjKlMnOpQrStUv", "api_org_AbCdEfGhIjKlMnOpQrStUv"),
    "openai": ("sk-proj-AbCd_EfGh-1234567890", "sk-proj-AbCd_EfGh-1234567890"),
    "wandb flag": (f"--logger.api_key {HEX}", HEX),
    "wandb json": (json.dumps({"init_args": {"api_key": HEX}}), HEX),
    "wandb yaml": (f"api_key: {HEX}", HEX),
    "bearer": ("Authorization: Bearer abcdefgh12345678", "abcdefgh12345678"),
    "basic": ("authorization: basic dXNlcjpwYXNz", "dXNlcjpwYXNz"),
    "query": ("http://host/x?token=abcdef123&b=1", "abcdef123"),
    "key": ("http://host/x?key=abcdef123", "abcdef123"),
    "flag": ("--publish.token=whatever1", "whatever1"),
    "spaced flag": ("--publish.token whatever1", "whatever1"),
    "quoted flag": ("--password 'two words'", "two words"),
    "signed": (
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.abcdefghijk",
        "eyJzdWIiOiIxMjM0NTY3ODkwIn0",
    ),
    "aws": ("AKIAIOSFODNN7EXAMPLE", "AKIAIOSFODNN7EXAMPLE"),
    "github": ("ghp_AbCdEfGhIjKlMnOpQrStUv", "ghp_AbCdEfGhIjKlMnOpQrStUv"),
}
HARMLESS = [
    "--drafter.token_weight 0.1 --endpoint.key_variable OPENAI_API_KEY --max_new_tokens 8 --tokens "
    "4",
    "a token of the target, one token per call; key: prompt",
    "https://huggingface.co/a/b@main",
    f"revision {HEX}",
    "python train.py --config clover.yaml --drafter.heads 4",
    "embed_tokens.weight",
    '{"time_to_first_token": 0.0123456789, "a_token": 1e-05}',
    "--data.train user/name",
]


@pytest.mark.parametrize("name", SECRETS)
def test_every_kind_of_credential_is_found(name: str) -> None:
    text, secret = SECRETS[name]
    for around in (text, f"x {text} y", f'"{text}"', f"a\n{text}\nb"):
        found = redacted(around)
        assert secret not in found and HIDDEN in found, found
        assert redacted(found) == found


@pytest.mark.parametrize("text", HARMLESS)
def test_other_text_stays(text: str) -> None:
    assert redacted(text) == text


def test_values_of_variables_and_of_keys_named_so_are_hidden(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", HEX)
    assert HEX not in redacted(f"it is {HEX}.")
    told = redact(
        {
            "api_key": "x",
            "nested": [{"my.token": "abc", "token_weight": 0.1, "tokens": "9"}],
            "n": 1,
        }
    )
    assert told == {
        "api_key": HIDDEN,
        "nested": [{"my.token": HIDDEN, "token_weight": 0.1, "tokens": "9"}],
        "n": 1,
    }


def test_a_command_line_is_stored_without_credentials_and_home(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", "/home/alice")
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "train.py",
            *(text for text, _ in SECRETS.values() if " " not in text),
            "--publish.token",
            "two words",
            "--config",
            "/home/alice/tiny.yaml",
        ],
    )
    told = command_line()
    print(told)
    assert all(secret not in told for text, secret in SECRETS.values() if " " not in text)
    assert "two words" not in told and "alice" not in told and "~/tiny.yaml" in told
    assert at_home("/home/alicea/x /home/alice") == "/home/alicea/x ~"


@pytest.mark.parametrize("name", ["hub", "openai", "url", "flag"])
def test_errors_do_not_repeat_credentials(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text, secret = SECRETS[name]
    word = text.split()[-1]
    arguments = [word] if word.startswith("--") else ["--publish.token", word]
    assert run(train_command, ["--config", "clover.yaml", *arguments]) == 2
    assert run(train_command, ["--config", "clover.yaml", "--publish.repo", word]) == 2
    told = capsys.readouterr().err
    assert secret not in told and told.count("\n") == 2


def test_settings_are_stored_without_credentials() -> None:
    parser = make_parser()
    config = parser.parse_args(
        ["--config", "configs/drafters/clover.yaml", "--data.train=https://u:pa55word@host/x.jsonl"]
    )
    assert "pa55word" not in str(recipe_settings(parser, config))
    told = Provenance(
        {"name": "x", "fingerprint": "y"},
        data={"train": SECRETS["url"][0]},
        settings={"trainer": {"api_key": HEX}},
        command=SECRETS["flag"][0],
    ).as_dict()
    assert all(secret not in str(told) for _, secret in SECRETS.values())


def test_places_of_files_are_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    target, place = tiny_target(), "/home/alice/secret-project"
    provenance = Provenance(
        {"name": f"{place}/models/llama", "fingerprint": target.fingerprint()},
        data={"train": f"{place}/chats.jsonl"},
        settings={
            "data": {
                "train": [
                    f"{place}/chats.jsonl",
                    f"{tmp_path}/runs/x",
                    "https://host/a/b",
                    "user/name",
                ]
            }
        },
        command=f"python train.py --config={place}/tiny.yaml --output {place}/r/base --data.train "
        "~/alice/x.jsonl",
    )
    save_pretrained(Medusa(target.shape, heads=2), tmp_path / "run" / "drafter", provenance)
    write(publication(tmp_path / "run", "ada/heads"), tmp_path / "out")
    texts = {
        path.name: path.read_text()
        for path in (tmp_path / "out").iterdir()
        if path.suffix != ".safetensors"
    }
    assert set(texts) == {"config.json", "provenance.json", "README.md"}
    assert all(
        "alice" not in text and "secret-project" not in text and str(tmp_path) not in text
        for text in texts.values()
    ), texts
    assert json.loads(texts["provenance.json"])["settings"]["data"]["train"] == [
        "chats.jsonl",
        "runs/x",
        "b",
        "user/name",
    ]
    assert json.loads(texts["config.json"])["target"]["name"] == "llama"


def test_portable_leaves_what_is_no_place() -> None:
    for text in (
        "1/2",
        "and/or",
        "USER/NAME",
        "runs/x",
        "3 / 4",
        "tokens/s",
        "a//b",
        "</think>",
        "'</think>'",
        "<p>a/b</p>",
        "3 /4",
        "about ~3/4 of it",
        "a=/b",
        "/no_think and/or",
        "'/no_think and/or'",
        "~",
        "https://huggingface.co/datasets/a/b/resolve/main/c.jsonl",
        "https://arxiv.org/abs/2401.10774",
        "Qwen/Qwen2.5-0.5B",
        "user/name@refs/convert/parquet",
        "2026/11/30",
        r"\frac{a}{b} \\ c",
        "a: b",
        "ratio 3:1",
        "file:",
        "file:x.jsonl",
    ):
        assert portable(text) == text, text


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("file:/home/al/d.jsonl", "d.jsonl"),
        ("file:///home/al/d.jsonl", "d.jsonl"),
        ("FILE://localhost/home/al/d.jsonl", "d.jsonl"),
        ("--data.train=file:///home/al/d.jsonl --x 1", "--data.train=d.jsonl --x 1"),
        ("see json+file:///home/al/d.jsonl.", "see json+d.jsonl."),
        ("'/home/al/My Models/llama'", "'llama'"),
        ('"file:///home/al/My Models/llama/"', '"llama"'),
        ("'--target=/home/al/My Models/llama' --x '/mnt/a b/c d'", "'--target=llama' --x 'c d'"),
        ("/home/al/My Models/llama", "llama"),
        ("~/My Models/llama", "llama"),
        ("~al/models/llama", "llama"),
        (r"--target /home/al/My\ Models/llama -x", "--target llama -x"),
        ("python /home/al/a.py /srv/b/c:/srv/d/e", "python a.py c:e"),
        ("<code>/home/al/x</code>", "<code>x</code>"),
        ("//home//al//x", "x"),
        ("--output /home/al", "--output ~"),
        ("“/home/al/x” +/mnt/b/y", "“x” +y"),
        (r"C:\Users\al\secret\d.jsonl", "d.jsonl"),
        (r"D:\My Data\secret\d e.jsonl", "d e.jsonl"),
        (r"--output C:\Users\al", "--output ~"),
        ("--data.train C:/Users/al/d.jsonl --x 1", "--data.train d.jsonl --x 1"),
        (r'--data.train="C:\My Data\d.jsonl" -x', '--data.train="d.jsonl" -x'),
        ("'--target=C:/My Data/llama' -x", "'--target=llama' -x"),
        (r"\\nas\al\secret\d.jsonl", "d.jsonl"),
        (r"see \\nas.corp\al$\d.jsonl, then", "see d.jsonl, then"),
        (json.dumps(r"\\nas\al\d.jsonl"), '"d.jsonl"'),
        (r"..\al\d.jsonl", "d.jsonl"),
        (r"secret\al\d.jsonl.gz", "d.jsonl.gz"),
        ("hdfs://namenode:9000/user/al/d.parquet", "d.parquet"),
        ("--data.train=s3://al-bucket/secret/d.jsonl -x", "--data.train=d.jsonl -x"),
        ("abfss://al@store.dfs.core.windows.net/x/y", "y"),
        ("gs://al-bucket", "gs://…"),
        ("http://10.0.0.3:8000", "http://…"),
        ("https://host:80/a/-/blob/main", "main"),
        ("../al/secret/d", "d"),
        ("../d.jsonl", "d.jsonl"),
        ("secret/d.jsonl", "d.jsonl"),
        ("runs/al/secret/x", "x"),
        ("--config drafters/clover.yaml --output runs/x", "--config clover.yaml --output runs/x"),
    ],
)
def test_portable_leaves_the_last_part_of_a_path(text: str, told: str) -> None:
    assert portable(text) == told
    assert portable(told) == told


def test_portable_makes_paths_below_the_working_directory_relative(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "my work"
    here.mkdir()
    monkeypatch.chdir(here)
    assert portable(f"'{here}/a b/c' {here}/runs/x file://{here}/d/e") == "'a b/c' runs/x d/e"
    assert portable(f"/mnt{tmp_path}/x/y") == "y"


def test_older_provenance_with_a_credential_is_refused(tmp_path: Path) -> None:
    target = tiny_target()
    folder = save_pretrained(
        Medusa(target.shape, heads=2), tmp_path / "drafter", Provenance.of(target)
    )
    for text, secret in SECRETS.values():
        told = json.loads((folder / "provenance.json").read_text())
        (folder / "provenance.json").write_text(json.dumps({**told, "command": text}))
        with pytest.raises(ValueError, match="looks like a token") as caught:
            publication(folder, "ada/heads")
        assert secret not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "AKIAIOSFODNN7EXAMPLE",
        f"AIza{WORD}",
        f"nvapi-{WORD}",
        f"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.{WORD}",
        f"-----BEGIN PRIVATE KEY-----\n{WORD}\n-----END PRIVATE KEY-----",
        f"https://a.example/c?sv=2022&sig={WORD}%3D",
        f"https://b.example/x?X-Amz-Signature={WORD}&X-Amz-Credential={WORD}",
        f"machine host login u password {WORD}",
        f"--endpoint.key {WORD}",
        f"Cookie: session={WORD}",
        json.dumps({"secret_key": WORD}),
        json.dumps(json.dumps({"api_key": WORD})),
    ],
    ids=lambda text: text[:12],
)
def test_more_kinds_of_credentials_are_left_out(text: str) -> None:
    for place in (text, f"--a 1 {text} --b", json.dumps({"x": text})):
        told = redacted(place)
        assert WORD not in told and "IOSFODNN7" not in told and HIDDEN in told
        assert redacted(told) == told


def test_words_near_credentials_stay() -> None:
    for text in (
        "--tokenizer.key_map 3",
        "keys and tokens per second: 12.5",
        "max_new_tokens: 64",
        "password protected",
        "sort_keys=True",
        "cookies are sweet",
        "a signature=",
    ):
        assert redacted(text) == text
