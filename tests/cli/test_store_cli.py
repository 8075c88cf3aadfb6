"""``kvtier store``: what each command says and does, for people and for programs, and how it refuses."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from kvtier.cli import app
from kvtier.cli.store import common
from kvtier.errors import StoreError
from kvtier.store import PrefixStore
from kvtier.store.format.archive import write_archive
from kvtier.store.tiers.disk.verify import VerifyReport
from tests.support.stores import OTHER_ROOT, block_files, commit, count, damage, ids, restored_length

FIRST = count(12)
SECOND = ids(0, 1, 2, 3, 50, 51)  # shares a block with the first
ALONE = count(5, 100)


@pytest.fixture
def folder(tmp_path):
    """A store of three sequences; the first is called ``letter``, the second ``a note``."""
    path = tmp_path / "store"
    with PrefixStore(path, block_size=4) as store:
        for tokens in (FIRST, SECOND):
            commit(store, tokens)
        commit(store, ALONE, OTHER_ROOT)
        store.flush()
        store.name("letter", "a1" * 32, FIRST)
        store.name("a note", "a1" * 32, SECOND, ttl=3600)
    return path


def kvtier(*arguments, env=None, **how):
    env = {"COLUMNS": "200", "KVTIER_STORE": None, **(env or {})}
    return CliRunner().invoke(app, ["store", *map(str, arguments)], env=env, **how)


def done(*arguments, **how):
    """Run a command that must succeed; return its standard output."""
    result = kvtier(*arguments, **how)
    assert result.exit_code == 0, result.output
    return result.stdout


def data(*arguments, code=0):
    """Run a command with ``--json``; standard output must be one object, and nothing else."""
    result = kvtier(*arguments, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def refusal(*arguments, code, **how):
    """Run a command that must fail with ``code``; return its one line."""
    result = kvtier(*arguments, **how)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


def names_in(folder):
    with PrefixStore(folder) as store:
        return {each.name: each for each in store.names()}


def bytes_in(folder):
    with PrefixStore(folder) as store:
        return store.stats().tiers[1].nbytes


def chains_in(folder):
    with PrefixStore(folder) as store:
        return store.chains()


def unnamed(folder):
    return next(chain for chain in chains_in(folder) if not chain.names)


@pytest.fixture
def person(monkeypatch):
    """Somebody sits at the terminal."""
    monkeypatch.setattr(common, "someone_is_there", lambda: True)


# --- which folder -----------------------------------------------------------------------------------------------------

COMMANDS = (
    ("ls",),
    ("ls", "--unnamed"),
    ("show", "letter"),
    ("du",),
    ("stats",),
    ("verify",),
    ("prune", "--expired"),
    ("pin", "letter"),
    ("unpin", "letter"),
    ("name", "ab", "new"),
    ("rename", "letter", "new"),
    ("export", "letter", "out.kvt"),
    ("rm", "letter", "--yes"),
)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_no_command_makes_a_store_where_there_is_none(command, tmp_path):
    line = refusal(*command, "--store", tmp_path / "none", code=2)
    assert f"no store in {tmp_path / 'none'}" in line
    assert "--store" in line
    assert not (tmp_path / "none").exists()


def test_a_folder_with_other_things_is_no_store(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    refusal("ls", "--store", tmp_path, code=2)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_environment_names_the_folder_and_the_option_wins(folder, tmp_path):
    env = {"KVTIER_STORE": str(folder)}
    assert "letter" in done("ls", env=env)
    refusal("ls", "--store", tmp_path / "none", code=2, env=env)


def test_without_either_it_is_the_one_in_the_cache_folder_of_the_user(folder, tmp_path):
    home = tmp_path / "home"
    (home / ".cache").mkdir(parents=True)
    folder.rename(home / ".cache" / "kvtier")
    assert "letter" in done("ls", env={"HOME": str(home)})


def test_a_store_of_the_future_is_told_in_one_line(folder):
    (folder / "kvtier.json").write_text('{"format_version": 999}')
    assert "newer kvtier" in refusal("ls", "--store", folder, code=1)


def test_a_folder_that_cannot_be_looked_into_is_told(folder, monkeypatch):
    def no(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.is_file", no)
    assert "cannot look into" in refusal("ls", "--store", folder, code=1)


def test_no_command_brings_a_budget_of_its_own(folder, monkeypatch):
    """A store may have been filled under a larger one than the default."""
    monkeypatch.setitem(PrefixStore.__init__.__kwdefaults__, "disk_budget", 1)
    seen = []
    whole = PrefixStore.names
    monkeypatch.setattr(PrefixStore, "names", lambda self: seen.append(self.stats().tiers[1]) or whole(self))
    done("ls", "--store", folder)
    assert seen[0].budget_bytes > 2**60


# --- looking ----------------------------------------------------------------------------------------------------------


def test_ls_shows_names_and_counts_the_rest(folder):
    lines = done("ls", "--store", folder).splitlines()
    assert lines[0].split() == [
        "name",
        "tokens",
        "kept",
        "size",
        "own",
        "last",
        "use",
        "age",
        "hits",
        "pinned",
        "expires",
        "in",
    ]
    assert lines[1].startswith("a note  ")
    assert lines[1].rstrip().endswith("59 min")
    assert lines[2].startswith("letter  ")
    assert lines[-1].startswith("1 chain without a name, ")


def test_ls_of_an_empty_store(tmp_path):
    PrefixStore(tmp_path / "empty").close()
    assert done("ls", "--store", tmp_path / "empty") == "The store is empty.\n"
    assert done("ls", "--unnamed", "--store", tmp_path / "empty") == "Nothing here is without a name.\n"


def test_ls_as_json_is_what_the_store_tells(folder):
    found = data("ls", "--store", folder)
    names = names_in(folder)
    assert found["store"] == str(folder)
    assert [each["name"] for each in found["names"]] == ["a note", "letter"]
    note, letter = found["names"]
    assert letter["tokens"] == letter["kept_tokens"] == 12
    assert (letter["bytes"], letter["own_bytes"]) == (names["letter"].nbytes, names["letter"].own_bytes)
    assert letter["expires_unix_seconds"] is None
    assert note["expires_unix_seconds"] == note["used_unix_seconds"] + 3600
    assert found["unnamed"] == {"chains": 1, "bytes": unnamed(folder).nbytes}


def test_ls_unnamed_gives_keys_that_name_takes(folder):
    (chain,) = data("ls", "--unnamed", "--store", folder)["chains"]
    assert chain["key"] == unnamed(folder).key
    assert (chain["tokens"], chain["names"]) == (5, [])
    heading, row = done("ls", "--unnamed", "--store", folder).splitlines()
    assert heading.split() == ["key", "tokens", "size", "last", "use", "hits", "model"]
    key = row.split()[0]
    assert chain["key"].startswith(key)
    done("name", key, "found", "--store", folder)
    assert names_in(folder)["found"].tokens == 5


def test_a_narrow_terminal_gets_fewer_columns_and_is_told_which(folder):
    text = done("ls", "--store", folder, env={"COLUMNS": "44"})
    assert max(map(len, text.splitlines()[:3])) <= 44
    assert "tokens" in text.splitlines()[0]
    assert "hits" not in text.splitlines()[0]
    assert "Too narrow for: " in text
    assert "hits" in text
    assert "Too narrow" not in done("ls", "--store", folder)


def test_a_long_name_is_folded_never_cut(folder):
    name = "ж" * 150
    done("rename", "letter", name, "--store", folder)
    text = done("ls", "--store", folder, env={"COLUMNS": "60"})
    assert text.count("ж") == 150


def test_a_name_is_shown_as_it_is_not_as_markup(folder):
    done("rename", "letter", "[red]x[/red]", "--store", folder)
    assert "[red]x[/red]" in done("ls", "--store", folder)


def test_show_tells_all_that_is_known(folder):
    text = done("show", "letter", "--tokens", 3, "--store", folder)
    facts = dict(line.split("  ", 1) for line in text.splitlines())
    assert facts["tokens"].strip() == "12"
    assert facts["token ids"].strip() == "0 1 2 …"
    assert facts["pinned"].strip() == "no"
    assert facts["expires"].strip() == "never"
    found = data("show", "letter", "--store", folder)
    assert found["first_token_ids"] == list(range(12))
    assert found["manifest"] == {"of": "a test"}
    assert found["manifest_problem"] is None


def test_show_without_the_file_of_its_root(folder):
    (folder / "roots" / f"{'a1' * 32}.json").unlink()
    assert "cannot be read" in done("show", "letter", "--store", folder)
    found = data("show", "letter", "--store", folder)
    assert found["manifest"] is None
    assert "cannot be read" in found["manifest_problem"]


def test_what_a_root_file_says_cannot_steer_the_terminal(folder):
    manifest = {"model": "Llama\x1b[2J\nForCausalLM", "config": {"num_hidden_layers": 2, "dtype": "bfloat16"}}
    (folder / "roots" / f"{'a1' * 32}.json").write_text(json.dumps(manifest))
    for command in (["show", "letter"], ["du"]):
        text = done(*command, "--store", folder)
        assert "\x1b" not in text
        assert "Llama\ufffd[2J\ufffdForCausalLM" in text
    assert "2 layers, bfloat16" in done("du", "--store", folder)


def test_du_counts_every_block_once(folder):
    found = data("du", "--store", folder)
    files = block_files(folder)
    by_root = {root["root"]: root for root in found["roots"]}
    assert sum(root["blocks"] for root in found["roots"]) == len(files)
    assert found["bytes"] == bytes_in(folder) == sum(root["bytes"] for root in found["roots"])
    assert found["unnamed_bytes"] == by_root[OTHER_ROOT]["bytes"]
    assert by_root[OTHER_ROOT]["named_bytes"] == 0
    assert by_root["a1" * 32]["named_bytes"] == by_root["a1" * 32]["bytes"]
    shared = {each["name"]: each["shared_bytes"] for each in found["names"]}
    own = sum(each["own_bytes"] for each in found["names"])
    assert shared["letter"] == shared["a note"] > 0
    assert own + shared["letter"] == by_root["a1" * 32]["bytes"]


def test_du_for_people_lists_models_and_names(folder):
    text = done("du", "--store", folder)
    assert "a1a1a1a1a1a1" in text
    assert "letter" in text
    assert text.splitlines()[-1].endswith("that no name uses.")


def test_stats_in_three_formats(folder):
    found = data("stats", "--store", folder)
    assert found["bytes"] == bytes_in(folder)
    assert (found["blocks"], found["chains"], found["names"]) == (len(block_files(folder)), 3, 2)
    assert data("stats", "--format", "json", "--store", folder) == found
    assert f"blocks  {found['blocks']}\n" in done("stats", "--store", folder)
    text = done("stats", "--format", "prometheus", "--store", folder)
    assert f'kvtier_store_held_bytes{{tier="disk"}} {found["bytes"]}\n' in text
    assert "_total" not in text  # nothing that only the programs which use the store can have counted
    assert "budget" not in text


# --- naming -----------------------------------------------------------------------------------------------------------


def test_name_with_pin_and_ttl(folder):
    found = data("name", unnamed(folder).key[:12], "kept", "--pin", "--ttl", "2h", "--store", folder)
    kept = names_in(folder)["kept"]
    assert found["name"] == "kept"
    assert kept.pinned
    assert kept.expires_at == pytest.approx(kept.used_at + 7200)


def test_name_does_not_take_a_name_unasked(folder):
    key = unnamed(folder).key
    assert "--replace" in refusal("name", key, "letter", "--store", folder, code=2)
    assert names_in(folder)["letter"].tokens == 12
    done("name", key, "letter", "--replace", "--store", folder)
    assert names_in(folder)["letter"].tokens == 5


@pytest.mark.parametrize("key", ["", "zz", "A1" * 40])
def test_a_key_that_nothing_has(folder, key):
    assert "ls --unnamed" in refusal("name", key, "new", "--store", folder, code=2)


def test_a_key_that_several_have_is_refused(folder):
    with PrefixStore(folder, block_size=4) as store:
        first = 200
        while len({chain.key[0] for chain in store.chains()}) == len(store.chains()):
            commit(store, count(4, first))
            first += 10
        chains = store.chains()
    digits = [chain.key[0] for chain in chains]
    twice = next(digit for digit in digits if digits.count(digit) > 1)
    assert f"{digits.count(twice)} chains have keys" in refusal("name", twice, "new", "--store", folder, code=2)
    assert "new" not in names_in(folder)


@pytest.mark.parametrize("ttl", ["", "soon", "0d", "-3d", "3 years"])
def test_a_ttl_that_is_no_duration(folder, ttl):
    line = refusal("name", unnamed(folder).key, "new", f"--ttl={ttl}", "--store", folder, code=2)
    assert line.startswith("kvtier store: --ttl=")


@pytest.mark.parametrize("name", ["", " x", "a\nb", "y" * 201])
def test_what_cannot_be_a_name(folder, name):
    assert "cannot be a name" in refusal("name", unnamed(folder).key, name, "--store", folder, code=2)
    assert "cannot be a name" in refusal("rename", "letter", name, "--store", folder, code=2)
    assert set(names_in(folder)) == {"a note", "letter"}


def test_rename(folder):
    assert done("rename", "letter", "l’été", "--store", folder) == "letter is now called l’été.\n"
    assert set(names_in(folder)) == {"a note", "l’été"}
    refusal("rename", "l’été", "a note", "--store", folder, code=2)
    refusal("rename", "letter", "new", "--store", folder, code=2)


def test_pin_and_unpin_take_several_names_all_or_none(folder):
    line = refusal("pin", "letter", "nobody", "--store", folder, code=2)
    assert "'nobody'" in line
    assert not names_in(folder)["letter"].pinned
    done("pin", "letter", "a note", "--store", folder)
    assert all(each.pinned for each in names_in(folder).values())
    refusal("unpin", "letter", "nobody", "--store", folder, code=2)
    assert names_in(folder)["letter"].pinned
    found = data("unpin", "letter", "--store", folder)
    assert [(each["name"], each["pinned"]) for each in found["names"]] == [("letter", False)]
    assert names_in(folder)["a note"].pinned


# --- removing ---------------------------------------------------------------------------------------------------------


def test_rm_removes_what_nothing_else_uses(folder):
    own = names_in(folder)["letter"].own_bytes
    before = bytes_in(folder)
    found = data("rm", "letter", "--yes", "--store", folder)
    assert found == {"removed_blocks": 2, "removed_bytes": own}
    assert bytes_in(folder) == before - own
    assert names_in(folder)["a note"].kept_tokens == 6


def test_rm_of_several_names_is_all_or_none(folder):
    refusal("rm", "letter", "nobody", "--yes", "--store", folder, code=2)
    assert "letter" in names_in(folder)
    done("rm", "letter", "a note", "letter", "--yes", "--store", folder)
    assert not names_in(folder)
    assert len(block_files(folder)) == 2  # those of the third sequence


def test_rm_by_key(folder):
    found = data("rm", "--key", unnamed(folder).key[:10], "--yes", "--store", folder)
    assert found["removed_blocks"] == 2
    assert all(chain.names for chain in chains_in(folder))


def test_rm_by_key_does_not_touch_what_has_a_name(folder):
    named = next(chain for chain in chains_in(folder) if chain.names == ("letter",))
    assert "'letter'" in refusal("rm", "--key", named.key, "--yes", "--store", folder, code=2)
    assert names_in(folder)["letter"].kept_tokens == 12


def test_rm_takes_names_or_a_key(folder):
    key = unnamed(folder).key
    for wrong in (["rm"], ["rm", "letter", "--key", key], ["rm", "--key", key, "--name-only"]):
        refusal(*wrong, "--yes", "--store", folder, code=2)
    assert "letter" in names_in(folder)
    assert unnamed(folder).key == key


def test_rm_of_the_name_only(folder):
    before = bytes_in(folder)
    done("rm", "letter", "--name-only", "--yes", "--store", folder)
    assert set(names_in(folder)) == {"a note"}
    assert bytes_in(folder) == before


DESTROYS = (("rm", "letter"), ("rm", "letter", "--name-only"), ("prune", "--to", "0"), ("verify", "--repair"))


@pytest.mark.parametrize("command", [*DESTROYS, ("prune", "--unused-for", "1s")], ids=" ".join)
def test_what_destroys_is_refused_where_nobody_can_be_asked(command, folder):
    before = bytes_in(folder)
    assert "--yes" in refusal(*command, "--store", folder, code=2)
    assert "letter" in names_in(folder)
    assert bytes_in(folder) == before


@pytest.mark.usefixtures("person")
@pytest.mark.parametrize("command", DESTROYS, ids=" ".join)
def test_what_destroys_asks(command, folder):
    damage(block_files(folder)[0], "flip", 9_000)
    before = bytes_in(folder)
    for answer in ("n\n", "\n"):
        result = kvtier(*command, "--store", folder, input=answer)
        assert result.exit_code == 1
        assert "nothing was done" in result.stderr
        assert result.stdout == ""
        assert bytes_in(folder) == before
    assert kvtier(*command, "--store", folder, input="y\n").exit_code == 0
    assert bytes_in(folder) < before or "letter" not in names_in(folder)


def test_prune_to_a_size_leaves_what_is_pinned(folder):
    done("pin", "letter", "--store", folder)
    text = done("prune", "--to", "0", "--yes", "--store", folder)
    names = names_in(folder)
    assert "the rest is pinned" in text
    assert names["letter"].kept_tokens == 12
    assert bytes_in(folder) == names["letter"].nbytes
    assert "a note" in names


def test_prune_by_age(folder, monkeypatch):
    assert data("prune", "--unused-for", "30d", "--yes", "--store", folder)["removed_blocks"] == 0
    now = time.time()
    monkeypatch.setitem(PrefixStore.__init__.__kwdefaults__, "clock", lambda: now + 31 * 86400)
    before = bytes_in(folder)
    removed = data("prune", "--unused-for", "30d", "--yes", "--store", folder)
    assert bytes_in(folder) == 0
    assert 0 < removed["removed_bytes"] <= before


def test_prune_of_what_has_expired_asks_nothing(folder, monkeypatch):
    now = time.time()
    monkeypatch.setitem(PrefixStore.__init__.__kwdefaults__, "clock", lambda: now + 3700)
    done("prune", "--expired", "--store", folder)
    assert set(names_in(folder)) == {"letter"}
    assert len(block_files(folder)) == 5


@pytest.mark.parametrize("wrong", [[], ["--expired", "--to", "1GiB"], ["--to", "much"], ["--unused-for", "long"]])
def test_prune_says_what_is_wrong(wrong, folder):
    refusal("prune", *wrong, "--yes", "--store", folder, code=2)


# --- verify -----------------------------------------------------------------------------------------------------------


def test_verify_of_a_store_that_is_whole(folder):
    assert "Nothing is wrong. 6 blocks" in done("verify", "--store", folder)
    found = data("verify", "--store", folder)
    assert found["ok"]
    assert found["problems"] == []
    assert found["blocks"] == 6


def test_verify_finds_damage_and_repairs_it(folder):
    path = block_files(folder)[0]
    damage(path, "flip", 9_000)
    result = kvtier("verify", "--store", folder)
    assert result.exit_code == 1
    assert "1 problem left" in result.stdout
    assert "damaged  open   blocks/" in result.stdout
    assert "--repair" in result.stdout
    found = data("verify", "--store", folder, code=1)
    assert not found["ok"]
    assert [(each["kind"], each["repaired"]) for each in found["problems"]] == [("damaged", False)]
    assert "All problems were repaired" in done("verify", "--repair", "--yes", "--store", folder)
    assert not path.exists()
    assert "Nothing is wrong" in done("verify", "--store", folder)


# --- carrying ---------------------------------------------------------------------------------------------------------


def test_export_does_not_replace_a_file_unasked(folder, tmp_path):
    (tmp_path / "mine").write_text("mine")
    assert "--overwrite" in refusal("export", "letter", tmp_path / "mine", "--store", folder, code=2)
    assert (tmp_path / "mine").read_text() == "mine"


def test_what_is_exported_is_imported_into_a_new_store(folder, tmp_path):
    file, new = tmp_path / "letter.kvt", tmp_path / "new"
    found = data("export", "letter", file, "--store", folder)
    assert found["file_bytes"] == file.stat().st_size
    assert found["file"] == str(file)
    assert "12 tokens" in done("import", file, "--store", new)
    with PrefixStore(new, block_size=4) as store:
        assert restored_length(store, FIRST) == 12
        assert [each.name for each in store.names()] == ["letter"]
    found = data("import", file, "--name", "again", "--store", new)
    assert (found["name"], found["kept_tokens"]) == ("again", 12)
    assert found["store"] == str(new)


def test_export_replaces_a_file_when_asked(folder, tmp_path):
    (tmp_path / "old").write_text("old")
    done("export", "letter", tmp_path / "old", "--overwrite", "--store", folder)
    done("import", tmp_path / "old", "--store", tmp_path / "new")


def test_a_file_that_is_no_export_makes_no_store(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    assert "cannot be imported" in refusal("import", tmp_path / "thesis.txt", "--store", tmp_path / "new", code=1)
    assert not (tmp_path / "new").exists()


def test_import_of_what_has_no_name_asks_for_one(folder, tmp_path):
    with PrefixStore(folder) as store:
        reader = store._tiers.open(store.admin._kept_blocks(store._tiers.names.get("letter"))[0])
        write_archive(tmp_path / "x", [reader], 4, root="a1" * 32, manifest={}, block_size=4)
        reader.close()
    assert "--name" in refusal("import", tmp_path / "x", "--store", tmp_path / "new", code=2)
    assert not (tmp_path / "new").exists()
    done("import", tmp_path / "x", "--name", "x", "--store", tmp_path / "new")


def test_import_does_not_take_a_name(folder, tmp_path):
    done("export", "letter", tmp_path / "x", "--store", folder)
    refusal("import", tmp_path / "x", "--name", "a note", "--store", folder, code=2)
    assert names_in(folder)["a note"].tokens == 6


def test_export_of_what_is_not_all_there(folder, tmp_path):
    done("prune", "--to", "0", "--yes", "--store", folder)
    assert "cannot be exported" in refusal("export", "letter", tmp_path / "x", "--store", folder, code=1)
    assert not (tmp_path / "x").exists()


def test_import_of_no_file_makes_no_store(tmp_path):
    assert "there is no file" in refusal("import", tmp_path / "gone", "--store", tmp_path / "new", code=2)
    assert not (tmp_path / "new").exists()


# --- how commands end -------------------------------------------------------------------------------------------------


def test_an_interrupt_ends_with_130(folder, monkeypatch):
    def interrupted(self, **how):
        raise KeyboardInterrupt

    monkeypatch.setattr(PrefixStore, "verify", interrupted)
    assert refusal("verify", "--store", folder, code=130) == "kvtier store: interrupted"


def test_a_failing_disk_is_one_line(folder, monkeypatch):
    def fails(self, **how):
        raise StoreError("the drive\nis gone")

    monkeypatch.setattr(PrefixStore, "verify", fails)
    assert refusal("verify", "--store", folder, code=1) == "kvtier store: the drive is gone"


def test_a_real_interrupt_while_verifying(folder):
    """A process of its own, stopped from outside in the middle of its work."""
    script = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # whoever runs the tests may ignore it
        "from kvtier.store import PrefixStore\n"
        "from kvtier.cli import app\n"
        "whole = PrefixStore.verify\n"
        "def verify(self, *, repair, progress):\n"
        "    def stop(done, total):\n"
        "        if done < total: signal.raise_signal(signal.SIGINT)\n"
        "    return whole(self, repair=repair, progress=stop)\n"
        "PrefixStore.verify = verify\n"
        "app(['store', 'verify', '--store', sys.argv[1]])\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 128 + signal.SIGINT, done.stderr
    assert done.stderr == "kvtier store: interrupted\n"
    assert done.stdout == ""
    assert not list((folder / "owners").iterdir())


def test_progress_is_shown_to_a_terminal_only(folder, monkeypatch):
    seen = []

    def verify(self, *, repair, progress):
        progress(1, 2)
        seen.append(progress)
        return VerifyReport(0, 0, 0.0, ())

    monkeypatch.setattr(PrefixStore, "verify", verify)
    assert kvtier("verify", "--store", folder).stderr == ""
    forced = kvtier("verify", "--store", folder, env={"FORCE_COLOR": "1", "TTY_COMPATIBLE": "1"})
    assert "Verifying" in forced.stderr
    assert "Verifying" not in forced.stdout
    assert len(seen) == 2


def test_help_names_every_command_and_the_exit_codes():
    text = done("--help")
    for command in {command[0] for command in COMMANDS} | {"import"}:
        assert f" {command} " in text
    assert "Exit codes" in text
