import pytest

from airgap.science import prompts, subjects, tasks
from airgap.science.grammar import TAGS
from airgap.science.prompts import Context
from airgap.science.refusals import PromptError
from airgap.science.subjects import Subject
from airgap.science.tasks import TASKS

WORDS = Context("tiny", 512, {tag: n for n, tag in enumerate(TAGS)}, vocabulary=150)
BYTES = Context("large", 512, {}, vocabulary=150_000)


def code_of(call, *args, **kwargs) -> str:
    with pytest.raises(PromptError) as refused:
        call(*args, **kwargs)
    assert refused.value.hint
    return refused.value.code


def test_every_task_is_found_by_name_alias_and_spelling():
    for name in TASKS:
        assert tasks.find_task(name).name == name
        assert tasks.find_task(f" {name.upper().replace('-', '_')} ").name == name
    for alias, name in tasks.ALIASES.items():
        if name in TASKS:
            assert tasks.find_task(alias).name == name


def test_unknown_task_names_the_nearest_and_lists_all():
    with pytest.raises(PromptError) as refused:
        tasks.find_task("retrosynthsis")
    assert refused.value.code == "prompt.task"
    assert "did you mean retrosynthesis?" in refused.value.hint
    assert all(name in refused.value.hint for name in TASKS)
    assert code_of(tasks.find_task, "") == "prompt.task"
    assert code_of(tasks.find_task, "x" * 10_000) == "prompt.task"


@pytest.mark.parametrize("name", ["protein-editing", "antibody-cdr", "cdr"])
def test_tasks_without_a_published_prompt_are_refused(name):
    with pytest.raises(PromptError) as refused:
        tasks.find_task(name)
    assert refused.value.code == "prompt.unpublished"
    assert "prompt format not published by the authors" in refused.value.message


WRONG_INPUTS = {
    "none": ("retrosynthesis", {}),
    "unknown": ("retrosynthesis", {"smiles": "C", "prompt": "<MoleculeS>"}),
    "two sources": ("binding-site", {"sequence": "M", "fasta": ">a\nM"}),
    "number for text": ("retrosynthesis", {"smiles": 5}),
    "text for flag": ("retrosynthesis", {"smiles": "C", "fix": "yes"}),
    "flag for number": ("binding-site", {"fasta": ">a\nM", "record": True}),
    "input of a free task": ("molecule", {"smiles": "C"}),
}


@pytest.mark.parametrize(("task", "inputs"), WRONG_INPUTS.values(), ids=WRONG_INPUTS.keys())
def test_wrong_inputs_are_refused(task, inputs):
    subjects.check_inputs(TASKS["retrosynthesis"], {"smiles": "C", "fix": True})
    assert code_of(subjects.check_inputs, TASKS[task], inputs) == "prompt.input"


FASTA = ">sp|P1|X human protein\nMKT AYI\n10 AKQ\n>second\nGGG\n"


def test_fasta_record_is_read_with_its_name_and_without_layout():
    notes: list[str] = []
    read = subjects.read_sequence({"fasta": FASTA, "record": 1}, notes)
    assert read == ("MKTAYIAKQ", tuple(str(n) for n in range(1, 10)), "FASTA record sp|P1|X")
    assert subjects.read_sequence({"fasta": FASTA, "record": 2}, notes)[0] == "GGG"
    assert subjects.read_sequence({"fasta": "MK\nTA\n"}, notes)[0] == "MKTA"


@pytest.mark.parametrize(
    ("inputs", "code"),
    [
        ({"fasta": FASTA}, "prompt.input"),
        ({"fasta": FASTA, "record": 3}, "prompt.input"),
        ({"fasta": ">only a header\n"}, "prompt.g06"),
        ({"sequence": ">a\nMK"}, "prompt.g03"),
        ({"sequence": "MKt"}, "prompt.g06"),
        ({"sequence": "MK-T"}, "prompt.g06"),
        ({"sequence": "<ProteinS>MK<ProteinE>"}, "prompt.g03"),
        ({"sequence": ""}, "prompt.g06"),
        ({"fasta": "M" * 13_000_000}, "prompt.size"),
        ({"sequence": "M" * 70_000}, "prompt.size"),
    ],
)
def test_bad_sequences_are_refused(inputs, code):
    assert code_of(subjects.read_sequence, inputs, []) == code


def test_fix_mends_what_was_offered_and_says_so():
    notes: list[str] = []
    assert subjects.read_sequence({"sequence": "mk-t*", "fix": True}, notes)[0] == "MKT"
    assert "upper-cased" in notes[0]


LABELS = ("A:-1", "A:1", "A:2", "A:2B", "A:5")


def test_residues_are_selected_by_label_and_range():
    plain = tuple(label[2:] for label in LABELS)
    assert subjects.select("1, 2-5;-1", plain, "residues") == [0, 1, 2, 3, 4]
    assert subjects.select("2B", plain, "residues") == [3]
    assert subjects.select("A:1-A:2", LABELS, "region") == [1, 2]
    for text in ("", "x", "1-", "3", "5-1", "1,,2", "1-99"):
        assert code_of(subjects.select, text, plain, "residues") == "prompt.input"


def test_region_keeps_labels_and_pockets_inside():
    subject = Subject(
        sequence="MKTAY", labels=("1", "2", "3", "4", "5"), pockets=(0, 2, 4), source="sequence"
    )
    part = subjects.cut_region(subject, "2-4")
    assert (part.sequence, part.labels, part.pockets) == ("KTA", ("2", "3", "4"), (1,))
    assert "2 to 4" in part.source
    assert code_of(subjects.cut_region, subject, "1,3-4") == "prompt.input"


# -- budget ---------------------------------------------------------------------------------------


def protein(length: int) -> Subject:
    return Subject(sequence="M" * length, labels=tuple(str(n + 1) for n in range(length)))


def room(name: str, subject: Subject, context: Context = WORDS, preset: str = "ours") -> int:
    task = TASKS[name]
    prompt = prompts.build_prompt(task, subject, {})
    return prompts.budget(task, subject, prompt, task.presets[preset], context)


def test_a_copy_gets_three_tokens_a_residue_and_its_end_tag():
    assert room("binding-site", protein(30)) == 91


def test_copy_that_just_fits_passes_and_one_more_is_refused_with_the_figure():
    assert room("binding-site", protein(126)) == 379
    with pytest.raises(PromptError) as refused:
        room("binding-site", protein(127))
    assert refused.value.code == "prompt.g10"
    assert "the prompt takes 132 tokens" in refused.value.message
    assert "needs 382, together 514; tiny holds 512" in refused.value.message
    assert "--region 1-126" in refused.value.hint


def test_authors_preset_asks_for_a_thousand_and_takes_what_is_left():
    product = Subject(product="CCO")
    assert room("retrosynthesis", product) == 70
    assert room("retrosynthesis", product, preset="authors-readme") == 512 - 7


def test_long_inputs_are_refused_and_never_cut():
    assert code_of(room, "retrosynthesis", Subject(product="C" * 400)) == "prompt.g10"
    with pytest.raises(PromptError) as refused:
        room("pocket-ligand", protein(450))
    assert "--region" in refused.value.hint


def test_large_vocabulary_counts_bytes_as_an_upper_bound():
    assert WORDS.count("<MoleculeS>[Na+]BrC<MoleculeE>") == 5
    assert BYTES.count("<MoleculeS>[Na+]BrC<MoleculeE>") == 10
    with pytest.raises(PromptError) as refused:
        room("binding-site", protein(127), BYTES)
    assert "at most" in refused.value.message


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"max_context": 0, "tags": {}},
        {"max_context": "512", "tags": {}},
        {"max_context": 512, "tags": ["<Search>"]},
        {"max_context": 512, "tags": {"<Search>": "4"}},
        {"max_context": 512, "tags": {}, "vocab_size": "many"},
    ],
)
def test_context_that_is_none_is_refused(document):
    prompts.parse_context({"max_context": 512, "tags": {"<Search>": 4}})
    assert code_of(prompts.parse_context, document) == "prompt.input"


# -- prompts and presets --------------------------------------------------------------------------


def test_prompts_have_the_published_forms():
    def build(name, subject):
        return prompts.build_prompt(TASKS[name], subject, {"K": "NCC(=O)O"})

    assert build("retrosynthesis", Subject(product="CCO")).endswith("CCO<MoleculeE><ReverseReact>")
    assert build("binding-site", Subject(sequence="MK")) == (
        "<ProteinS>MK<ProteinE><Search><ProteinS>"
    )
    pocket = Subject(sequence="MK", pockets=(1,), level=2)
    assert build("pocket-ligand", pocket) == ("<ProteinS>M<PocketS>K<PocketE><ProteinE><MoleculeS>")
    deep = Subject(sequence="MK", pockets=(1,), level=3)
    assert "<PocketS>NCC(=O)O<PocketE>" in build("pocket-ligand", deep)
    assert build("pocket-ligand", Subject(sequence="MK")) == "<ProteinS>MK<ProteinE><MoleculeS>"
    assert build("molecule", Subject()) == "<MoleculeS>"
    assert build("material", Subject()) == "<MaterialS>"


def test_grammar_part_is_what_the_worker_reads():
    from airgap.inference.protocol import MODES
    from airgap.inference.protocol import TASKS as KNOWN

    for name, task in TASKS.items():
        spec = prompts.grammar_spec(task, Subject(sequence="MK"))
        assert spec["mode"] in MODES
        assert spec.get("task", name) in KNOWN
    assert prompts.grammar_spec(TASKS["binding-site"], Subject(sequence="MK")) == {
        "mode": "copy",
        "sequence": "MK",
    }


def test_presets_state_every_value_and_switch_the_penalty_off_for_copies():
    ours, readme, script = (
        TASKS["retrosynthesis"].presets[name]
        for name in ("ours", "authors-readme", "authors-script")
    )
    assert (ours.temperature, ours.top_p, ours.top_k, ours.repetition_penalty) == (
        *(1.2, 0.85, 50, 1.05),
    )
    assert readme.temperature == 1.2
    assert (script.temperature, script.top_p) == (0.7, 0.95)
    assert TASKS["binding-site"].presets["ours"].repetition_penalty == 1.0
    assert TASKS["binding-site"].presets["authors-readme"].repetition_penalty == 1.05
    assert TASKS["material"].presets["authors-readme"].n == 10_000


def test_options_change_the_preset_and_are_checked():
    task = TASKS["molecule"]
    preset, extra = tasks.choose_preset(task, {"n": 5, "temperature": 1, "seed": 3, "top_k": 0})
    assert (preset.n, preset.temperature, preset.top_k, extra) == (5, 1.0, 0, {"seed": 3})
    assert tasks.preset_document(preset, extra)["seed"] == 3
    assert tasks.preset_document(preset, {})["name"] == "ours"


WRONG_OPTIONS = {
    "zero samples": {"n": 0},
    "a million samples": {"n": 10**6},
    "text": {"n": "many"},
    "a flag": {"n": True},
    "a fraction": {"n": 2.5},
    "not a number": {"temperature": float("nan")},
    "infinite": {"temperature": float("inf")},
    "nucleus of nothing": {"top_p": 0.0},
    "nucleus above one": {"top_p": 1.1},
    "negative seed": {"seed": -1},
    "unknown option": {"beam": 4},
    "unknown preset": {"preset": "best"},
    "preset of another type": {"preset": 3},
    "no script for this task": {"preset": "authors-script"},
}


@pytest.mark.parametrize("options", WRONG_OPTIONS.values(), ids=WRONG_OPTIONS.keys())
def test_wrong_options_are_refused(options):
    assert code_of(tasks.choose_preset, TASKS["molecule"], options) == "prompt.option"


def test_user_may_lower_the_budget_but_not_below_a_full_copy():
    assert prompts.limit_new_tokens(200, {"max_new_tokens": 50}, TASKS["molecule"]) == 50
    assert prompts.limit_new_tokens(200, {"max_new_tokens": 900}, TASKS["molecule"]) == 200
    (note,) = prompts.budget_note(200, {"max_new_tokens": 900})
    assert "900" in note
    assert prompts.budget_note(200, {"max_new_tokens": 200}) == prompts.budget_note(200, {}) == []
    asked = {"max_new_tokens": 50}
    assert code_of(prompts.limit_new_tokens, 91, asked, TASKS["binding-site"]) == "prompt.option"


def test_level_follows_the_pocket_and_is_recorded():
    task = TASKS["pocket-ligand"]
    notes: list[str] = []
    marked = Subject(sequence="MK", labels=("1", "2"), pockets=(1,))
    assert subjects.choose_level(task, marked, None, notes).level == 2
    assert subjects.choose_level(task, marked, 1, notes).pockets == ()
    assert subjects.choose_level(task, marked, 3, notes).level == 3
    assert any("not published" in note for note in notes)
    bare = Subject(sequence="MK", labels=("1", "2"))
    assert subjects.choose_level(task, bare, None, notes).level == 1
    assert code_of(subjects.choose_level, task, bare, 2, notes) == "prompt.input"
    assert code_of(subjects.choose_level, task, marked, 4, notes) == "prompt.input"
    odd = Subject(sequence="MX", labels=("1", "2"), pockets=(1,))
    assert code_of(subjects.choose_level, task, odd, 3, notes) == "prompt.input"
    assert subjects.choose_level(TASKS["binding-site"], bare, 3, notes) == bare


@pytest.mark.parametrize(
    "text", [">a\rMK\rNG\r", ">a\r\nMK\r\nNG\r\n", "\ufeff>a\nMK\nNG", ">a\nMKNG"]
)
def test_a_fasta_record_of_any_editor_is_read(text):
    assert subjects.read_sequence({"fasta": text}, [])[0] == "MKNG"


def test_the_two_wishes_stand_in_the_preset_and_are_explained():
    task = TASKS["molecule"]
    preset, _ = tasks.choose_preset(task, {})
    assert (preset.valence, preset.ppl_authors, tasks.setting_notes(preset)) == (False, False, [])
    preset, _ = tasks.choose_preset(task, {"valence": True, "ppl_authors": True})
    document = tasks.preset_document(preset, {})
    assert (document["valence"], document["ppl_authors"]) == (True, True)
    forced, authors = tasks.setting_notes(preset)
    assert "validity was forced" in forced
    assert "tokenised again" in authors
    assert code_of(tasks.choose_preset, task, {"valence": 1}) == "prompt.option"
    assert code_of(tasks.choose_preset, TASKS["binding-site"], {"valence": True}) == "prompt.option"
    kept, _ = tasks.choose_preset(TASKS["binding-site"], {"ppl_authors": True})
    assert kept.ppl_authors
