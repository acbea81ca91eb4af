"""The real clients (huggingface_hub, transformers, datasets) against the local Hub, over a socket, in children."""

from __future__ import annotations

from pathlib import Path

import pytest

from bot.localhub import seed
from tests.localhub.server import RunningHub

pytestmark = pytest.mark.slow


def test_what_the_real_client_uploads_is_what_it_downloads(local_hub: RunningHub, tmp_path: Path) -> None:
    found = local_hub.client(
        """
        import filecmp, os, warnings
        from pathlib import Path
        from huggingface_hub import hf_hub_download, snapshot_download
        from huggingface_hub.utils import EntryNotFoundError
        url = api.create_repo("alice/one", private=True)
        api.upload_file(path_or_fileobj=b"hello", path_in_repo="a/b/hello.txt", repo_id="alice/one")
        folder = Path(HOME) / "folder"
        (folder / "sub dir").mkdir(parents=True)
        (folder / "sub dir/x#1.json").write_text('{"a": 1}')
        (folder / "empty.txt").write_bytes(b"")
        (folder / "small.safetensors").write_bytes(b"123")
        (folder / "parts.bin").write_bytes(os.urandom(12_000_001))  # three parts of a multipart upload
        commit = api.upload_folder(repo_id="alice/one", folder_path=folder, commit_message="all of it")
        got = Path(snapshot_download("alice/one", revision=commit.oid))
        same = [filecmp.cmp(path, got / path.relative_to(folder), shallow=False)
                for path in folder.rglob("*") if path.is_file()]
        one = hf_hub_download("alice/one", "a/b/hello.txt")
        try:
            hf_hub_download("alice/one", "nothing.txt")
            absent = False
        except EntryNotFoundError:
            absent = True
        api.create_tag("alice/one", tag="v1")
        api.create_branch("alice/one", branch="side")
        api.delete_file("a/b/hello.txt", "alice/one")
        api.delete_folder("sub dir", "alice/one")
        refs = api.list_repo_refs("alice/one")
        result = dict(
            url=str(url), same=same, text=Path(one).read_text(), absent=absent,
            files=sorted(api.list_repo_files("alice/one")),
            tagged=sorted(api.list_repo_files("alice/one", revision="v1")),
            exists=[api.file_exists("alice/one", "small.safetensors"), api.file_exists("alice/one", "no")],
            titles=[c.title for c in api.list_repo_commits("alice/one")],
            refs=[[r.name for r in refs.branches], [r.name for r in refs.tags]],
            paths=[(p.path, getattr(p, "size", None)) for p in api.get_paths_info("alice/one", ["small.safetensors"])],
            folders=[e.path for e in api.list_repo_tree("alice/one", revision="v1") if not hasattr(e, "size")],
        )
        """,
        tmp_path / "home",
        "alice",
    )
    assert found["url"] == f"{local_hub.url}/alice/one"
    assert found["same"] == [True] * 4
    assert found["text"] == "hello" and found["absent"]
    assert found["files"] == [".gitattributes", "empty.txt", "parts.bin", "small.safetensors"]
    assert set(found["tagged"]) - set(found["files"]) == {"a/b/hello.txt", "sub dir/x#1.json"}
    assert found["exists"] == [True, False]
    assert found["titles"][-1] == "initial commit" and found["titles"][-3] == "all of it"
    assert found["refs"] == [["main", "side"], ["v1"]]
    assert found["paths"] == [["small.safetensors", 3]] and found["folders"] == ["a", "sub dir"]
    assert local_hub.unknown() == []


def test_a_stale_parent_changes_nothing_and_a_wrong_sha256_is_never_stored(
    local_hub: RunningHub, tmp_path: Path
) -> None:
    found = local_hub.client(
        """
        from huggingface_hub import CommitOperationAdd
        from huggingface_hub.utils import HfHubHTTPError
        api.create_repo("alice/cas")
        first = api.model_info("alice/cas").sha
        second = api.upload_file(path_or_fileobj=b"1", path_in_repo="x.txt", repo_id="alice/cas").oid
        status = {}
        try:
            late = [CommitOperationAdd("y.txt", b"2")]
            api.create_commit("alice/cas", late, commit_message="late", parent_commit=first)
        except HfHubHTTPError as error:
            status["stale"] = error.response.status_code
        lying = CommitOperationAdd("w.safetensors", b"honest")
        lying.upload_info.sha256 = bytes(32)
        try:
            api.create_commit("alice/cas", [lying], commit_message="lying")
        except Exception as error:
            while error.__cause__ is not None and not isinstance(error, HfHubHTTPError):
                error = error.__cause__
            status["lying"] = error.response.status_code
        try:
            api.delete_file("never.txt", "alice/cas")
        except Exception as error:
            status["nothing"] = type(error).__name__
        again = api.create_commit("alice/cas", [CommitOperationAdd("x.txt", b"1")], commit_message="same")
        result = dict(status=status, head=api.model_info("alice/cas").sha == second, same=again.oid == second,
                      files=api.list_repo_files("alice/cas"))
        """,
        tmp_path / "home",
        "alice",
    )
    assert found["status"] == {"stale": 412, "lying": 400, "nothing": "RemoteEntryNotFoundError"}
    assert found["head"] and found["same"]
    assert found["files"] == [".gitattributes", "x.txt"]
    assert not [path for path in (local_hub.root / "blobs").rglob("*") if path.is_file()]


def test_a_parent_is_named_by_its_first_seven_digits_and_a_pull_request_starts_there(
    local_hub: RunningHub, tmp_path: Path
) -> None:
    found = local_hub.client(
        """
        from huggingface_hub import CommitOperationAdd
        from huggingface_hub.utils import HfHubHTTPError
        api.create_repo("alice/short")
        def commit(path, parent, **more):
            added = [CommitOperationAdd(path, path.encode())]
            return api.create_commit("alice/short", added, commit_message=path, parent_commit=parent, **more)
        first = api.model_info("alice/short").sha
        second = commit("a.txt", first[:7]).oid
        refused = []
        for parent in (first[:7], first):
            try:
                commit("late.txt", parent)
            except HfHubHTTPError as error:
                refused.append(error.response.status_code)
        pull = commit("b.txt", first[:7], create_pr=True)
        files = api.list_repo_files("alice/short", revision=pull.pr_revision)
        api.merge_pull_request("alice/short", pull.pr_num)
        result = dict(refused=refused, files=files, merged=api.list_repo_files("alice/short"))
        """,
        tmp_path / "home",
        "alice",
    )
    assert found["refused"] == [412, 412]
    assert found["files"] == [".gitattributes", "b.txt"]
    assert found["merged"] == [".gitattributes", "a.txt", "b.txt"]


def test_lists_obey_filters_sort_expand_and_pages(local_hub: RunningHub, tmp_path: Path) -> None:
    found = local_hub.client(
        """
        def card(name, text):
            api.create_repo(name)
            words = f"---\\n{text}\\n---\\n# x\\n".encode()
            api.upload_file(path_or_fileobj=words, path_in_repo="README.md", repo_id=name)
        card("alice/a", "license: mit\\ntags: [merge, x]\\nbase_model: [o/one, o/two]\\nbase_model_relation: merge")
        card("alice/b", "license: apache-2.0\\ntags: [merge]\\npipeline_tag: text-generation")
        for n in range(3):
            api.create_repo(f"alice/plain{n}")
        api.create_repo("alice/hidden", private=True)
        names = lambda **how: [m.id for m in api.list_models(**how)]
        polled = list(api.list_models(filter="merge", sort="last_modified", expand=["sha", "lastModified", "tags"]))
        result = dict(
            all=len(names(author="alice")), merge=names(filter="merge", sort="last_modified"),
            both=names(filter=["merge", "license:mit"]), base=names(filter="base_model:merge:o/one"),
            search=names(search="PLAIN", sort="created_at"), limit=names(search="plain", limit=1),
            other=names(author="bob"),
            polled=[m.sha == api.model_info(m.id).sha and m.author is None for m in polled],
            licence=api.model_info("alice/a").card_data.license,
            tags=api.model_info("alice/a").tags,
        )
        """,
        tmp_path / "home",
        "alice",
    )
    assert found["all"] == 6 and found["other"] == []
    assert found["merge"] == ["alice/b", "alice/a"] and found["both"] == ["alice/a"] and found["base"] == ["alice/a"]
    assert found["search"] == ["alice/plain2", "alice/plain1", "alice/plain0"] and len(found["limit"]) == 1
    assert found["polled"] == [True, True] and found["licence"] == "mit"
    assert {"merge", "x", "base_model:o/two", "base_model:merge:o/two", "license:mit"} <= set(found["tags"])


def test_cards_are_checked_before_they_are_stored(local_hub: RunningHub, tmp_path: Path) -> None:
    found = local_hub.client(
        """
        from huggingface_hub import ModelCard, metadata_update
        api.create_repo("alice/card")
        ModelCard("---\\nlicense: mit\\nmergebot:\\n  version: 1\\n---\\n\\n# Hello\\n").push_to_hub("alice/card")
        metadata_update("alice/card", {"tags": ["merge"]})
        before = api.model_info("alice/card")
        try:
            ModelCard("---\\nlicense: [1, 2]\\n---\\n# x\\n").push_to_hub("alice/card")
            refused = ""
        except ValueError as error:
            refused = str(error)
        after = api.model_info("alice/card")
        loaded = ModelCard.load("alice/card")
        result = dict(refused=refused, same=before.sha == after.sha, tags=before.card_data.tags,
                      block=loaded.data.to_dict()["mergebot"], text=loaded.text.strip())
        """,
        tmp_path / "home",
        "alice",
    )
    assert "license" in found["refused"] and found["same"]
    assert found["tags"] == ["merge"] and found["block"] == {"version": 1} and found["text"] == "# Hello"


def test_discussions_and_pull_requests_live_as_on_the_hub(local_hub: RunningHub, tmp_path: Path) -> None:
    local_hub.client('api.create_repo("alice/talk")', tmp_path / "home-a", "alice")
    found = local_hub.client(
        """
        from huggingface_hub import CommitOperationAdd
        from huggingface_hub.utils import HfHubHTTPError
        threads = [api.create_discussion("alice/talk", f"thread {n}", description="first words").num for n in range(3)]
        event = api.comment_discussion("alice/talk", 1, "more")
        api.edit_discussion_comment("alice/talk", 1, event.id, "better")
        api.rename_discussion("alice/talk", 1, "renamed thread")
        api.change_discussion_status("alice/talk", 1, "closed", comment="bye")
        files = [CommitOperationAdd("x.safetensors", b"abc"), CommitOperationAdd("y.txt", b"y")]
        pr = api.create_commit("alice/talk", files, commit_message="A proposal", commit_description="w", create_pr=True)
        try:
            api.upload_file(path_or_fileobj=b"z", path_in_repo="z.txt", repo_id="alice/talk")
            pushed = 200
        except HfHubHTTPError as error:
            pushed = error.response.status_code
        one = api.get_discussion_details("alice/talk", 1)
        result = dict(
            threads=threads, pr=pr.pr_num, pushed=pushed, title=one.title, status=one.status,
            texts=[e.content for e in one.events if e.type == "comment"],
            mine=[d.num for d in api.get_repo_discussions("alice/talk", author="bob", discussion_type="discussion")],
            open=[d.num for d in api.get_repo_discussions("alice/talk", discussion_status="open")],
            files=api.list_repo_files("alice/talk", revision="refs/pr/4"),
            draft=api.get_discussion_details("alice/talk", 4).status,
        )
        """,
        tmp_path / "home-b",
        "bob",
    )
    assert found["threads"] == [1, 2, 3] and found["pr"] == 4 and found["pushed"] == 403
    assert found["title"] == "renamed thread" and found["status"] == "closed"
    assert found["texts"] == ["first words", "better", "bye"]
    assert sorted(found["mine"]) == [1, 2, 3] and sorted(found["open"]) == [2, 3, 4]
    assert found["files"] == [".gitattributes", "x.safetensors", "y.txt"] and found["draft"] == "draft"
    merged = local_hub.client(
        """
        from huggingface_hub import hf_hub_download
        api.merge_pull_request("alice/talk", 4)
        details = api.get_discussion_details("alice/talk", 4)
        result = [details.status, details.merge_commit_oid == api.model_info("alice/talk").sha,
                  open(hf_hub_download("alice/talk", "x.safetensors"), "rb").read().decode()]
        """,
        tmp_path / "home-a",
        "alice",
    )
    assert merged == ["merged", True, "abc"]
    assert local_hub.unknown() == []


def test_a_moved_repo_is_found_under_its_old_name_and_a_deleted_one_is_gone(
    local_hub: RunningHub, tmp_path: Path
) -> None:
    found = local_hub.client(
        """
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import RepositoryNotFoundError
        api.create_repo("mergebot/old")
        api.upload_file(path_or_fileobj=b"weights", path_in_repo="m.safetensors", repo_id="mergebot/old")
        api.move_repo("mergebot/old", "mergebot-org/new")
        result = dict(info=api.model_info("mergebot/old").id,
                      data=open(hf_hub_download("mergebot/old", "m.safetensors"), "rb").read().decode())
        api.delete_repo("mergebot-org/new")
        try:
            api.model_info("mergebot-org/new")
        except RepositoryNotFoundError as error:
            result["gone"] = error.response.status_code
        api.create_repo("mergebot/old")
        result["fresh"] = api.list_repo_files("mergebot/old")
        """,
        tmp_path / "home",
        "mergebot",
    )
    assert found == {"info": "mergebot-org/new", "data": "weights", "gone": 404, "fresh": [".gitattributes"]}


def test_transformers_loads_what_it_pushed_and_asks_for_nothing_unknown(local_hub: RunningHub, tmp_path: Path) -> None:
    found = local_hub.client(
        """
        import torch
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
        from transformers import PreTrainedTokenizerFast
        sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=32)
        model = LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **sizes))
        model.push_to_hub("alice/tiny", max_shard_size="10KB")
        words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").push_to_hub("alice/tiny")
        sha = api.model_info("alice/tiny").sha
        loaded = AutoModelForCausalLM.from_pretrained("alice/tiny", revision=sha)
        tokenizer = AutoTokenizer.from_pretrained("alice/tiny", revision=sha)
        info = api.model_info("alice/tiny")
        result = dict(
            equal=all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items()),
            ids=tokenizer("a b c")["input_ids"], tags=info.tags, total=info.safetensors.total,
            shards=sum(name.endswith(".safetensors") for name in api.list_repo_files("alice/tiny")),
            header=sorted(api.get_safetensors_metadata("alice/tiny").weight_map)[:1],
        )
        """,
        tmp_path / "home",
        "alice",
    )
    assert found["equal"] and found["ids"] == [0, 1, 2] and found["shards"] > 1
    assert {"transformers", "safetensors", "llama", "text-generation"} <= set(found["tags"])
    assert found["total"] == 6224 and found["header"] == ["lm_head.weight"]
    assert local_hub.unknown() == []


def test_datasets_loads_the_seeded_benchmarks_at_a_pinned_commit(
    local_hub: RunningHub, tmp_path: Path, shared: Path
) -> None:
    names = seed(local_hub.root, shared / "hub_seed")
    assert "datasets/allenai/ai2_arc" in names
    assert seed(local_hub.root, shared / "hub_seed") == names  # a second time changes nothing
    found = local_hub.client(
        """
        import datasets
        result = {}
        for path, name in [("allenai/ai2_arc", "ARC-Easy"), ("baber/piqa", None), ("openai/gsm8k", "main"),
                           ("EleutherAI/lambada_openai", "default"), ("allenai/openbookqa", "main")]:
            info = api.dataset_info(path)
            loaded = datasets.load_dataset(path=path, name=name, revision=info.sha)
            result[path] = [len(list(api.list_repo_commits(path, repo_type="dataset"))), loaded.num_rows]
        """,
        tmp_path / "home",
    )
    assert found["allenai/ai2_arc"][1]["test"] == 2336
    assert all(commits == 2 for commits, _ in found.values())
    assert found["openai/gsm8k"][1]["test"] > 0 and set(found["baber/piqa"][1]) == {"train", "validation"}
    assert local_hub.unknown() == []
    assert all(entry["status"] < 500 for entry in local_hub.journal())


def test_the_less_common_calls_are_understood_too(local_hub: RunningHub, tmp_path: Path) -> None:
    found = local_hub.client(
        """
        from huggingface_hub import HfFileSystem, get_hf_file_metadata, hf_hub_url
        api.create_repo("alice/m")
        api.create_repo("alice/s", repo_type="space", space_sdk="gradio")
        api.create_repo("alice/d", repo_type="dataset")
        api.upload_file(path_or_fileobj=b"abc", path_in_repo="a/x.safetensors", repo_id="alice/m")
        api.upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id="alice/m", commit_message="second")
        tree = {e.path: e.last_commit.title for e in api.list_repo_tree("alice/m", recursive=True, expand=True)}
        info = api.model_info("alice/m", files_metadata=True)
        files = HfFileSystem(token=api.token)
        with files.open("datasets/alice/d/data/rows.jsonl", "w") as out:
            out.write('{"a": 1}')
        meta = get_hf_file_metadata(hf_hub_url("alice/m", "a/x.safetensors"))
        api.auth_check("alice/m")
        api.update_repo_settings("alice/m", visibility="private")
        result = dict(
            tree=tree, sizes={s.rfilename: s.size for s in info.siblings}, lfs=info.siblings[1].lfs.sha256,
            found=files.find("datasets/alice/d"), read=files.cat("datasets/alice/d/data/rows.jsonl").decode(),
            meta=[meta.size, meta.commit_hash == info.sha], private=api.model_info("alice/m").private,
            spaces=[s.id for s in api.list_spaces(author="alice")], sdk=api.space_info("alice/s").sdk,
            datasets=[d.id for d in api.list_datasets(author="alice", full=True)],
            stage=api.get_space_runtime("alice/s").stage, exists=api.repo_exists("alice/none"),
            url=[api.revision_exists("alice/m", "main"), api.revision_exists("alice/m", "v0")],
        )
        """,
        tmp_path / "home",
        "alice",
    )
    assert found["tree"] == {".gitattributes": "initial commit", "config.json": "second",
                             "a": found["tree"]["a"], "a/x.safetensors": found["tree"]["a"]}  # fmt: skip
    assert found["sizes"]["a/x.safetensors"] == 3 and found["lfs"].startswith("ba7816bf")
    assert found["read"] == '{"a": 1}' and "datasets/alice/d/data/rows.jsonl" in found["found"]
    assert found["meta"] == [3, True] and found["private"] is True
    assert found["spaces"] == ["alice/s"] and found["sdk"] == "gradio" and found["stage"] == "STOPPED"
    assert found["datasets"] == ["alice/d"] and found["exists"] is False and found["url"] == [True, False]
    assert local_hub.unknown() == []
