"""What is encrypted opens for its recipients, with the common tool as well, and for nobody else."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyrage
import pytest

from holdfast.care.backup_set import list_sets
from holdfast.care.packing import Unreadable, pack, seal_for, unpack
from holdfast.care.seal import AgeSeal, seal_of, writing_seal
from holdfast.errors import SettingsError
from holdfast.ops import SessionPut
from holdfast.settings import Settings, chosen, load
from tests.engine_harness import do, running

CONTENT = b'{"recipientPhone":"573001234567"},\n' * 20_000


class Keys:
    """A pair of keys, the secret one in a file."""

    def __init__(self, path: Path) -> None:
        identity = pyrage.x25519.Identity.generate()
        self.path = path
        self.recipient = str(identity.to_public())
        path.write_text(f"# created: today\n# public key: {self.recipient}\n{identity}\n")
        path.chmod(0o600)


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path / "key.txt")


def seal(keys: Keys) -> AgeSeal:
    found = seal_of(settings(recipients=[keys.recipient], identity_file=str(keys.path)))
    assert found is not None
    return found


def settings(**backups: object) -> Settings:
    return chosen({f"backups.{name}": value for name, value in backups.items()})


def test_what_was_encrypted_comes_back(keys: Keys) -> None:
    """In whatever pieces; it does not show what is in it."""
    packed = b"".join(pack([CONTENT], seal(keys)))

    assert b"573001234567" not in packed
    assert (
        b"".join(unpack((packed[start : start + 1_001] for start in range(0, len(packed), 1_001)), seal(keys)))
        == CONTENT
    )


def test_the_tool_age_opens_it(keys: Keys, tmp_path: Path) -> None:
    """Without Holdfast: age -d, then zstd -d."""
    if shutil.which("age") is None:
        pytest.skip("the tool age is not installed")
    (tmp_path / "chat_sessions.json.zst.age").write_bytes(b"".join(pack([CONTENT], seal(keys))))

    opened = subprocess.run(
        ["age", "-d", "-i", str(keys.path), str(tmp_path / "chat_sessions.json.zst.age")],
        capture_output=True,
        check=True,
        timeout=20,
    ).stdout

    assert b"".join(unpack([opened])) == CONTENT


def test_every_recipient_opens_it(keys: Keys, tmp_path: Path) -> None:
    """Those of a file as well, with comments and empty lines in it."""
    second = Keys(tmp_path / "second.txt")
    (tmp_path / "recipients").write_text(f"# of the office\n\n{second.recipient}\n")

    packed = b"".join(pack([CONTENT], seal_of(settings(recipients=[keys.recipient, str(tmp_path / "recipients")]))))

    for one in (keys, second):
        assert b"".join(unpack([packed], seal_of(Settings(), identity=one.path))) == CONTENT


def test_another_key_does_not_open_it(keys: Keys, tmp_path: Path) -> None:
    """The reason says that it is the key, and how to name the right one."""
    packed = b"".join(pack([CONTENT], seal(keys)))
    other = seal_of(Settings(), identity=Keys(tmp_path / "other.txt").path)

    with pytest.raises(Unreadable, match=r"encrypted for another key.*--identity"):
        b"".join(unpack([packed], other))


def test_what_is_encrypted_is_not_taken_for_damaged_where_nothing_is_set() -> None:
    """Without recipients and key in the settings the reason is the key that lacks, and what is not encrypted is read."""
    assert seal_for("users.json.zst", None) is None
    with pytest.raises(Unreadable, match=r"there is no key.*--identity"):
        seal_for("users.json.zst.age", None)


def test_without_a_key_it_can_be_written_but_not_read(keys: Keys) -> None:
    """As on a machine that only makes backups."""
    only = seal_of(settings(recipients=[keys.recipient]))

    assert only is not None
    assert only.can_close_up
    assert not only.can_open
    with pytest.raises(Unreadable, match=r"there is no key; name it by --identity"):
        b"".join(unpack([b"".join(pack([CONTENT], only))], only))


def test_a_key_alone_encrypts_nothing(keys: Keys) -> None:
    """Whoever names no recipient wants no encryption; older backups can still be read."""
    reading = seal_of(settings(identity_file=str(keys.path)))

    assert reading is not None
    assert reading.can_open
    assert writing_seal(reading) is None
    assert seal_of(Settings()) is None


def test_every_changed_byte_and_every_cut_is_noticed(keys: Keys) -> None:
    """Also one at the border of two parts of age's, which are of 64 KiB."""
    content = bytes(range(256)) * 600
    sealed = b"".join(seal(keys).close_up([content]))
    header = len(sealed) - len(content) - 3 * 16
    places = {*range(0, header, 7), header, header + 65_535, header + 65_551, header + 65_552, len(sealed) - 1}

    for place in sorted(places):
        changed = bytearray(sealed)
        changed[place] ^= 1
        for damaged in (bytes(changed), sealed[:place]):
            with pytest.raises(Unreadable, match=r"changed or cut short|not what age wrote|another key"):
                b"".join(seal(keys).open([damaged]))
    with pytest.raises(Unreadable, match="changed or cut short"):
        b"".join(seal(keys).open([sealed + b"x"]))


def test_an_error_of_what_is_read_is_passed_on(keys: Keys) -> None:
    """It is not taken for one of the encryption."""

    def failing() -> Iterator[bytes]:
        yield CONTENT
        raise FileNotFoundError("gone")

    with pytest.raises(FileNotFoundError, match="gone"):
        b"".join(seal(keys).close_up(failing()))


def test_whoever_stops_in_the_middle_leaves_no_thread(keys: Keys) -> None:
    """What is read from is not touched any more either, so that it can be closed."""
    taken = 0

    def endless() -> Iterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield CONTENT

    pieces = seal(keys).close_up(endless())
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]

    stopped_at = taken
    next(seal(keys).close_up([CONTENT]))
    assert taken == stopped_at


def test_memory_does_not_grow_with_what_is_encrypted(keys: Keys) -> None:
    """Encrypted and decrypted as a stream: 200 MB take a few."""
    program = f"""
import resource
from holdfast.care.seal import seal_of
from holdfast.settings import chosen
seal = seal_of(chosen({{"backups.recipients": [{keys.recipient!r}], "backups.identity_file": {str(keys.path)!r}}}))
piece = bytes(1 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
size = sum(map(len, seal.open(seal.close_up(piece for _ in range(200)))))
print(size, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    told = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    ).stdout

    size, grown = map(int, told.split())
    unit = 1 if sys.platform == "darwin" else 1 << 10
    assert size == 200 << 20
    assert grown * unit < 40 << 20, f"grown by {grown * unit >> 20} MiB"


def test_a_credential_of_systemd_is_named_without_a_path(
    keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LoadCredential=holdfast-key:/etc/holdfast/key.txt, and nothing else to be known of where it is."""
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))

    found = seal_of(settings(identity_file="key.txt"))

    assert found is not None
    assert found.can_open
    monkeypatch.delenv("CREDENTIALS_DIRECTORY")
    with pytest.raises(SettingsError, match=r"names a systemd credential.*LoadCredential="):
        seal_of(settings(identity_file="key.txt"))


@pytest.mark.parametrize("variable", ["HOLDFAST_BACKUPS__IDENTITY", "HOLDFAST_BACKUPS__S3_SECRET", "HOLDFAST_IDENTITY"])
def test_no_key_comes_from_the_environment(variable: str, tmp_path: Path) -> None:
    """It is refused with the reason, and not shown."""
    with pytest.raises(SettingsError, match="keys are not taken from the environment") as refusal:
        load({}, {variable: "AGE-SECRET-KEY-1QQ"}, cwd=tmp_path)

    assert "1QQ" not in str(refusal.value)


@pytest.mark.parametrize("name", ["backups.identity_file", "backups.recipients", "backups.s3_credentials_file"])
def test_a_key_in_place_of_its_path_is_refused_and_not_shown(name: str, tmp_path: Path) -> None:
    """The settings may only say where it is: from the environment too, where a path harms nobody."""
    variable = "HOLDFAST_" + name.upper().replace(".", "__")

    with pytest.raises(SettingsError, match=r"found a (secret )?key") as refusal:
        load({}, {variable: "AGE-SECRET-KEY-1QQ"}, cwd=tmp_path)

    assert "1QQ" not in str(refusal.value)


@pytest.mark.parametrize("line", ["{}", "key: {}", "'{}'"])
def test_a_key_among_the_recipients_is_refused_and_not_shown(line: str, tmp_path: Path) -> None:
    """However it is written: the refusal goes to a log."""
    for key in (str(pyrage.x25519.Identity.generate()), str(pyrage.x25519.Identity.generate()).lower()):
        (tmp_path / "recipients").write_text(line.format(key) + "\n")

        with pytest.raises(SettingsError, match="found a secret key") as refusal:
            seal_of(settings(recipients=str(tmp_path / "recipients")))

        assert key not in str(refusal.value)


def test_files_that_hold_no_keys_are_refused_with_the_reason(keys: Keys, tmp_path: Path) -> None:
    """Missing, open to everybody, of another kind; and what they hold is not shown."""
    words = tmp_path / "words"
    words.write_text("correct horse\n")
    words.chmod(0o600)
    for file, reason in (
        (tmp_path / "none", "cannot be read: No such file"),
        (tmp_path, "something else"),
        (words, "AGE-SECRET-KEY-1"),
    ):
        with pytest.raises(SettingsError, match=reason) as refusal:
            seal_of(Settings(), identity=file)
        assert "horse" not in str(refusal.value)
    keys.path.chmod(0o644)
    with pytest.raises(SettingsError, match="chmod 600"):
        seal_of(Settings(), identity=keys.path)
    for recipient, reason in (("age1nonsense", "found 'age1nonsense'"), ("/nowhere", "cannot be read: No such file")):
        with pytest.raises(SettingsError, match=reason):
            seal_of(settings(recipients=[recipient]))


def test_a_key_of_ssh_serves_as_well(tmp_path: Path) -> None:
    """As for age: the public key of a person is often at hand already."""
    if shutil.which("ssh-keygen") is None:
        pytest.skip("ssh-keygen is not installed")
    key = tmp_path / "id_ed25519"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True, timeout=20)
    recipient = key.with_suffix(".pub").read_text().strip()

    packed = b"".join(pack([CONTENT], seal_of(settings(recipients=[recipient]))))

    assert b"".join(unpack([packed], seal_of(Settings(), identity=key))) == CONTENT


def test_a_backup_is_made_while_its_key_is_away(keys: Keys, tmp_path: Path) -> None:
    """Whoever encrypts needs the recipients only; that it was not proved is told, and the key proves it later."""
    away = tmp_path / "mounted-later.txt"
    sealed = {"recipients": (keys.recipient,), "identity_file": str(away)}
    with running(tmp_path / "data", backups=sealed) as engine:
        do(engine, SessionPut(id="57300", value={"currentState": "catalog"}))
        made = engine.backup("api")
        told = list(engine.degraded)
        keys.path.rename(away)
        proof = engine.backups.prove(list_sets(tmp_path / "data")[0])

    assert made.proved is None and str(away) in made.problem
    assert any(str(away) in reason for reason in told)
    assert proof is not None and proof.ok and proof.counts["sessions"] == 1
