"""Commands of ``kvtier store``: effects, text and JSON output, refusals and exit codes."""

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
from kvtier.store.manage.verify import VerifyReport
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
    """A user is at the terminal."""
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
def test_commands_refuse_a_missing_store_and_do_not_create_it(command, tmp_path):
    line = refusal(*command, "--store", tmp_path / "none", code=2)
    assert f"no store in {tmp_path / 'none'}" in line
    assert "--store" in line
    assert not (tmp_path / "none").exists()


def test_ls_refuses_a_folder_with_foreign_files(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    refusal("ls", "--store", tmp_path, code=2)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_store_option_overrides_the_environment_variable(folder, tmp_path):
    env = {"KVTIER_STORE": str(folder)}
    assert "letter" in done("ls", env=env)
    refusal("ls", "--store", tmp_path / "none", code=2, env=env)


def test_default_store_is_in_the_user_cache_folder(folder, tmp_path):
    home = tmp_path / "home"
    (home / ".cache").mkdir(parents=True)
    folder.rename(home / ".cache" / "kvtier")
    assert "letter" in done("ls", env={"HOME": str(home)})


def test_store_of_a_newer_format_is_refused_in_one_line(folder):
    (folder / "kvtier.json").write_text('{"format_version": 999}')
    assert "newer kvtier" in refusal("ls", "--store", folder, code=1)


def test_folder_without_read_permission_is_refused_in_one_line(folder, monkeypatch):
    def no(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.is_file", no)
    assert "cannot look into" in refusal("ls", "--store", folder, code=1)


def test_ls_does_not_apply_the_default_disk_budget(folder, monkeypatch):
    """A store may have been filled under a larger budget than the default."""
    monkeypatch.setitem(PrefixStore.__init__.__kwdefaults__, "disk_budget", 1)
    seen = []
    whole = PrefixStore.names
    monkeypatch.setattr(PrefixStore, "names", lambda self: seen.append(self.stats().tiers[1]) or whole(self))
    done("ls", "--store", folder)
    assert seen[0].budget_bytes > 2**60


# --- inspection -------------------------------------------------------------------------------------------------------


def test_ls_lists_names_and_counts_unnamed_chains(folder):
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
        "model",
    ]
    assert lines[1].startswith("a note  ")
    assert lines[1].rstrip().endswith("59 min  root a1a1a1a1a1a1")
    assert lines[2].startswith("letter  ")
    assert lines[-1].startswith("1 chain without a name, ")


def test_ls_says_that_an_empty_store_is_empty(tmp_path):
    PrefixStore(tmp_path / "empty").close()
    assert done("ls", "--store", tmp_path / "empty") == "The store is empty.\n"
    assert done("ls", "--unnamed", "--store", tmp_path / "empty") == "Nothing here is without a name.\n"


def test_ls_json_agrees_with_the_store(folder):
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


def test_ls_unnamed_lists_keys_that_the_name_command_accepts(folder):
    (chain,) = data("ls", "--unnamed", "--store", folder)["chains"]
    assert chain["key"] == unnamed(folder).key
    assert (chain["tokens"], chain["names"]) == (5, [])
    heading, row = done("ls", "--unnamed", "--store", folder).splitlines()
    assert heading.split() == ["key", "tokens", "size", "last", "use", "hits", "model"]
    key = row.split()[0]
    assert chain["key"].startswith(key)
    done("name", key, "found", "--store", folder)
    assert names_in(folder)["found"].tokens == 5


def test_ls_on_a_narrow_terminal_drops_columns_and_lists_them(folder):
    text = done("ls", "--store", folder, env={"COLUMNS": "44"})
    assert max(map(len, text.splitlines()[:3])) <= 44
    assert "tokens" in text.splitlines()[0]
    assert "hits" not in text.splitlines()[0]
    assert "Too narrow for: " in text
    assert "hits" in text
    assert "Too narrow" not in done("ls", "--store", folder)


def test_ls_folds_a_long_name_without_cutting_it(folder):
    name = "ж" * 150
    done("rename", "letter", name, "--store", folder)
    text = done("ls", "--store", folder, env={"COLUMNS": "60"})
    assert text.count("ж") == 150


def test_ls_shows_markup_in_a_name_literally(folder):
    done("rename", "letter", "[red]x[/red]", "--store", folder)
    assert "[red]x[/red]" in done("ls", "--store", folder)


def test_show_prints_the_facts_of_a_prefix_as_text_and_json(folder):
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


def test_show_reports_a_missing_root_file(folder):
    (folder / "roots" / f"{'a1' * 32}.json").unlink()
    assert "cannot be read" in done("show", "letter", "--store", folder)
    found = data("show", "letter", "--store", folder)
    assert found["manifest"] is None
    assert "cannot be read" in found["manifest_problem"]


def test_show_and_du_replace_control_characters_of_a_root_file(folder):
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


def test_du_text_lists_roots_names_and_unnamed_bytes(folder):
    text = done("du", "--store", folder)
    assert "a1a1a1a1a1a1" in text
    assert "letter" in text
    assert text.splitlines()[-1].endswith("that no name uses.")


def test_stats_agree_as_text_json_and_prometheus_metrics(folder):
    found = data("stats", "--store", folder)
    assert found["bytes"] == bytes_in(folder)
    assert (found["blocks"], found["chains"], found["names"]) == (len(block_files(folder)), 3, 2)
    assert data("stats", "--format", "json", "--store", folder) == found
    assert f"blocks  {found['blocks']}\n" in done("stats", "--store", folder)
    text = done("stats", "--format", "prometheus", "--store", folder)
    assert f'kvtier_store_held_bytes{{tier="disk"}} {found["bytes"]}\n' in text
    assert "_total" not in text  # no counters, which only the processes that use the store can have
    assert "budget" not in text


# --- naming -----------------------------------------------------------------------------------------------------------


def test_name_command_sets_pin_and_ttl(folder):
    found = data("name", unnamed(folder).key[:12], "kept", "--pin", "--ttl", "2h", "--store", folder)
    kept = names_in(folder)["kept"]
    assert found["name"] == "kept"
    assert kept.pinned
    assert kept.expires_at == pytest.approx(kept.used_at + 7200)


def test_name_command_moves_an_existing_name_only_with_replace(folder):
    key = unnamed(folder).key
    assert "--replace" in refusal("name", key, "letter", "--store", folder, code=2)
    assert names_in(folder)["letter"].tokens == 12
    done("name", key, "letter", "--replace", "--store", folder)
    assert names_in(folder)["letter"].tokens == 5


@pytest.mark.parametrize("key", ["", "zz", "A1" * 40])
def test_name_command_refuses_an_unknown_key(folder, key):
    assert "ls --unnamed" in refusal("name", key, "new", "--store", folder, code=2)


def test_name_command_refuses_an_ambiguous_key(folder):
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
def test_name_command_refuses_an_invalid_ttl(folder, ttl):
    line = refusal("name", unnamed(folder).key, "new", f"--ttl={ttl}", "--store", folder, code=2)
    assert line.startswith("kvtier store: --ttl=")


@pytest.mark.parametrize("name", ["", " x", "a\nb", "y" * 201])
def test_name_and_rename_commands_refuse_invalid_names(folder, name):
    assert "cannot be a name" in refusal("name", unnamed(folder).key, name, "--store", folder, code=2)
    assert "cannot be a name" in refusal("rename", "letter", name, "--store", folder, code=2)
    assert set(names_in(folder)) == {"a note", "letter"}


def test_rename_command_refuses_taken_and_unknown_names(folder):
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


def test_rm_removes_only_the_blocks_that_no_other_name_shares(folder):
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
    assert len(block_files(folder)) == 2  # the blocks of the third sequence


def test_rm_by_key_removes_an_unnamed_chain(folder):
    found = data("rm", "--key", unnamed(folder).key[:10], "--yes", "--store", folder)
    assert found["removed_blocks"] == 2
    assert all(chain.names for chain in chains_in(folder))


def test_rm_by_key_refuses_a_named_chain(folder):
    named = next(chain for chain in chains_in(folder) if chain.names == ("letter",))
    assert "'letter'" in refusal("rm", "--key", named.key, "--yes", "--store", folder, code=2)
    assert names_in(folder)["letter"].kept_tokens == 12


def test_rm_refuses_wrong_combinations_of_names_and_key(folder):
    key = unnamed(folder).key
    for wrong in (["rm"], ["rm", "letter", "--key", key], ["rm", "--key", key, "--name-only"]):
        refusal(*wrong, "--yes", "--store", folder, code=2)
    assert "letter" in names_in(folder)
    assert unnamed(folder).key == key


def test_rm_name_only_keeps_the_blocks(folder):
    before = bytes_in(folder)
    done("rm", "letter", "--name-only", "--yes", "--store", folder)
    assert set(names_in(folder)) == {"a note"}
    assert bytes_in(folder) == before


DESTROYS = (("rm", "letter"), ("rm", "letter", "--name-only"), ("prune", "--to", "0"), ("verify", "--repair"))


@pytest.mark.parametrize("command", [*DESTROYS, ("prune", "--unused-for", "1s")], ids=" ".join)
def test_destructive_commands_without_a_terminal_require_yes(command, folder):
    before = bytes_in(folder)
    assert "--yes" in refusal(*command, "--store", folder, code=2)
    assert "letter" in names_in(folder)
    assert bytes_in(folder) == before


@pytest.mark.usefixtures("person")
@pytest.mark.parametrize("command", DESTROYS, ids=" ".join)
def test_destructive_commands_ask_for_confirmation(command, folder):
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


def test_prune_to_a_size_keeps_pinned_prefixes(folder):
    done("pin", "letter", "--store", folder)
    text = done("prune", "--to", "0", "--yes", "--store", folder)
    names = names_in(folder)
    assert "the rest is pinned" in text
    assert names["letter"].kept_tokens == 12
    assert bytes_in(folder) == names["letter"].nbytes
    assert "a note" in names


def test_prune_unused_for_removes_only_old_blocks(folder, monkeypatch):
    assert data("prune", "--unused-for", "30d", "--yes", "--store", folder)["removed_blocks"] == 0
    now = time.time()
    monkeypatch.setitem(PrefixStore.__init__.__kwdefaults__, "clock", lambda: now + 31 * 86400)
    before = bytes_in(folder)
    removed = data("prune", "--unused-for", "30d", "--yes", "--store", folder)
    assert bytes_in(folder) == 0
    assert 0 < removed["removed_bytes"] <= before


def test_prune_expired_does_not_ask_for_confirmation(folder, monkeypatch):
    now = time.time()
    monkeypatch.setitem(PrefixStore.__init__.__kwdefaults__, "clock", lambda: now + 3700)
    done("prune", "--expired", "--store", folder)
    assert set(names_in(folder)) == {"letter"}
    assert len(block_files(folder)) == 5


@pytest.mark.parametrize("wrong", [[], ["--expired", "--to", "1GiB"], ["--to", "much"], ["--unused-for", "long"]])
def test_prune_refuses_missing_conflicting_or_invalid_options(wrong, folder):
    refusal("prune", *wrong, "--yes", "--store", folder, code=2)


# --- verify -----------------------------------------------------------------------------------------------------------


def test_verify_finds_no_problems_in_an_intact_store(folder):
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


# --- export and import ------------------------------------------------------------------------------------------------


def test_export_refuses_to_replace_a_file_without_overwrite(folder, tmp_path):
    (tmp_path / "mine").write_text("mine")
    assert "--overwrite" in refusal("export", "letter", tmp_path / "mine", "--store", folder, code=2)
    assert (tmp_path / "mine").read_text() == "mine"


def test_exported_prefix_is_imported_into_a_new_store(folder, tmp_path):
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


def test_export_replaces_a_file_with_overwrite(folder, tmp_path):
    (tmp_path / "old").write_text("old")
    done("export", "letter", tmp_path / "old", "--overwrite", "--store", folder)
    done("import", tmp_path / "old", "--store", tmp_path / "new")


def test_import_of_a_foreign_file_creates_no_store(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    assert "cannot be imported" in refusal("import", tmp_path / "thesis.txt", "--store", tmp_path / "new", code=1)
    assert not (tmp_path / "new").exists()


def test_import_of_an_unnamed_archive_requires_a_name(folder, tmp_path):
    with PrefixStore(folder) as store:
        reader = store._tiers.open(store.admin._blocks(store._tiers.names.get("letter").keys)[0])
        write_archive(tmp_path / "x", [reader], 4, root="a1" * 32, manifest={}, block_size=4)
        reader.close()
    assert "--name" in refusal("import", tmp_path / "x", "--store", tmp_path / "new", code=2)
    assert not (tmp_path / "new").exists()
    done("import", tmp_path / "x", "--name", "x", "--store", tmp_path / "new")


def test_import_refuses_the_name_of_another_prefix(folder, tmp_path):
    done("export", "letter", tmp_path / "x", "--store", folder)
    refusal("import", tmp_path / "x", "--name", "a note", "--store", folder, code=2)
    assert names_in(folder)["a note"].tokens == 6


def test_export_refuses_an_incomplete_prefix(folder, tmp_path):
    done("prune", "--to", "0", "--yes", "--store", folder)
    assert "cannot be exported" in refusal("export", "letter", tmp_path / "x", "--store", folder, code=1)
    assert not (tmp_path / "x").exists()


def test_import_of_a_missing_file_creates_no_store(tmp_path):
    assert "there is no file" in refusal("import", tmp_path / "gone", "--store", tmp_path / "new", code=2)
    assert not (tmp_path / "new").exists()


# --- exit codes and progress ------------------------------------------------------------------------------------------


def test_interrupted_command_exits_with_130(folder, monkeypatch):
    def interrupted(self, **how):
        raise KeyboardInterrupt

    monkeypatch.setattr(PrefixStore, "verify", interrupted)
    assert refusal("verify", "--store", folder, code=130) == "kvtier store: interrupted"


def test_store_error_is_printed_in_one_line_with_exit_code_1(folder, monkeypatch):
    def fails(self, **how):
        raise StoreError("the drive\nis gone")

    monkeypatch.setattr(PrefixStore, "verify", fails)
    assert refusal("verify", "--store", folder, code=1) == "kvtier store: the drive is gone"


@pytest.mark.sample(2, of="new processes")
def test_sigint_during_verify_exits_with_130_and_leaves_no_owner(folder):
    """A separate process receives SIGINT in the middle of its work."""
    script = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # the parent process may ignore it
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


def test_verify_shows_progress_only_on_a_terminal(folder, monkeypatch):
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


def test_rm_forgets_a_chat_of_which_only_the_messages_are_kept(folder):
    with PrefixStore(folder) as store:
        store.chats.write("talk", {"messages": []}, after=None)
    assert "pass --yes" in refusal("rm", "talk", "--store", folder, code=2)
    done("rm", "talk", "letter", "--yes", "--store", folder)
    with PrefixStore(folder) as store:
        assert store.chats.names() == ()
    assert sorted(names_in(folder)) == ["a note"]


@pytest.mark.parametrize(
    "arguments",
    [["ls", "--store", "~no-such-user/x"], ["import", "x" * 5000], ["export", "x", "x" * 5000]],
    ids=["unknown user", "import", "export"],
)
def test_place_that_cannot_be_looked_at_is_one_line(tmp_path, arguments):
    result = CliRunner().invoke(app, ["store", *arguments], env={"KVTIER_STORE": str(tmp_path)})
    assert result.exit_code in (1, 2)
    (line,) = result.stderr.splitlines()
    assert line.startswith("kvtier store: ")
