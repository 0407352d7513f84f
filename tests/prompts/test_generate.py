"""Answers end where they should, are given out as soon as they are certain, and never too early."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import PROSE, elsewhere, make_compressor, make_model, make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sac_rag.lm.generator import Generator
from sac_rag.prompts.assemble import Prompt, assemble
from sac_rag.prompts.generate import Decoding, Generation, _Writer

TOKENIZER = make_tokenizer()
SAMPLED = Decoding(max_new_tokens=24, temperature=1.0, seed=7)
SENTENCE = "The lighthouse keeper counted."

# Bytes of several characters: emoji with a joiner, Arabic, combining marks, a real U+FFFD.
MULTI_BYTE = (
    "naïve café",
    "👩‍🚀 and 🇫🇷",
    "كم سفينة عدّ الحارس؟",
    "e\u0301 \u212b",
    "日本語、テスト",
    "a \N{REPLACEMENT CHARACTER} b\N{REPLACEMENT CHARACTER}",
    "\x00\x7f\r\n\t",
)


def saying(text: str) -> Generator:
    """A real Llama that says one text and ends: each token follows from the token before alone.

    Attention and MLP add nothing, so that the last hidden state is the token's own embedding, and
    the head answers each embedding with the next token.
    """
    script = [1, *TOKENIZER(text).input_ids, 0]
    assert len(set(script)) == len(script), "each token must have one successor"
    model = make_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.norm.weight.fill_(1)
        model.lm_head.weight.zero_()
        embeddings = torch.nn.functional.normalize(model.model.embed_tokens.weight, dim=-1)
        for token, after in pairwise(script):
            model.lm_head.weight[after] = embeddings[token]
    return Generator(model, TOKENIZER)


@pytest.fixture(scope="module")
def parrot() -> Generator:
    return saying(SENTENCE)


def start(generator: Generator, *prompts: Sequence[int]) -> Prompt:
    return assemble([[list(ids)] for ids in prompts or [[1]]], generator)


def write(generator: Generator, decoding: Decoding, prompt: Prompt | None = None) -> Generation:
    generation = Generation(generator, prompt or start(generator), decoding)
    pieces = ["".join(row) for row in zip(*generation, strict=True)]
    assert pieces == generation.texts
    return generation


@contextmanager
def passes_of(generator: Generator) -> Iterator[list[int]]:
    """Notes the tokens of every forward pass of the decoder stack."""
    passes: list[int] = []
    handle = generator.model.base_model.register_forward_hook(
        lambda module, args, output: passes.append(output[0].shape[1])
    )
    try:
        yield passes
    finally:
        handle.remove()


# --- Decoding


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", -1),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("top_k", -1),
        ("stop", ("",)),
        ("stop", ("a", "")),
        ("stop", ""),
    ],
)
def test_a_value_out_of_range_is_refused_by_field(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{field} must be .*, was: "):
        Decoding(**{field: value})


def test_one_stop_text_may_be_given_alone() -> None:
    assert Decoding(stop="END").stop == ("END",)  # type: ignore[arg-type]
    assert Decoding(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]


def test_no_stop_texts_given_and_none_wanted_are_told_apart() -> None:
    assert Decoding().stop is None
    assert Decoding(stop=()).stop == ()
    assert Decoding(stop=[]).stop == ()  # type: ignore[arg-type]


# --- how an answer ends


def test_an_end_token_ends_the_answer_and_is_counted_but_not_shown(parrot: Generator) -> None:
    generation = write(parrot, Decoding())
    assert generation.texts == [SENTENCE]
    assert generation.finish_reasons == ["eos"]
    assert generation.num_tokens == [len(TOKENIZER(SENTENCE).input_ids) + 1]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_an_answer_has_at_most_max_new_tokens(parrot: Generator, count: int) -> None:
    with passes_of(parrot) as passes:
        generation = write(parrot, Decoding(max_new_tokens=count))
    assert generation.texts == [TOKENIZER.decode(TOKENIZER(SENTENCE).input_ids[:count])]
    assert generation.finish_reasons == ["length"]
    assert generation.num_tokens == [count]
    assert len(passes) == count


def test_an_answer_that_just_fits_ends_as_it_would(parrot: Generator) -> None:
    tokens = len(TOKENIZER(SENTENCE).input_ids)
    assert write(parrot, Decoding(max_new_tokens=tokens + 1)).finish_reasons == ["eos"]
    assert write(parrot, Decoding(max_new_tokens=tokens)).finish_reasons == ["length"]


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (("keeper",), "The lighthouse "),
        (("house keeper count",), "The light"),  # across several tokens
        (("e",), "Th"),
        (("T",), ""),  # at the first token
        (("The lighthouse keeper counted.",), ""),
        (("counted", "light"), "The "),
        (("nowhere",), SENTENCE),
        (("counted..",), SENTENCE),  # begun and never finished
        ((".",), SENTENCE[:-1]),
    ],
)
def test_a_stop_text_ends_the_answer_and_is_not_part_of_it(
    parrot: Generator, stop: tuple[str, ...], expected: str
) -> None:
    with passes_of(parrot) as passes:
        generation = write(parrot, Decoding(stop=stop))
    assert generation.texts == [expected]
    assert generation.finish_reasons == ["eos" if expected == SENTENCE else "stop"]
    assert generation.num_tokens == [len(passes)]


def test_no_piece_shows_a_stop_text_that_may_still_come(parrot: Generator) -> None:
    given_out = ""
    for (piece,) in Generation(parrot, start(parrot), Decoding(stop=("house keeper!",))):
        given_out += piece
        rest = SENTENCE.removeprefix(given_out)
        assert not given_out.endswith(("house", "house k"))
        assert given_out + rest == SENTENCE
    assert given_out == SENTENCE


def test_text_that_cannot_become_a_stop_text_is_given_at_once(parrot: Generator) -> None:
    pieces = [piece for (piece,) in Generation(parrot, start(parrot), Decoding(stop=("xyz",)))]
    tokens = TOKENIZER(SENTENCE).input_ids
    assert pieces == [*(TOKENIZER.decode([token]) for token in tokens), ""]


def test_rows_end_each_on_its_own() -> None:
    """Rows that have ended give no more text, and the others continue as if alone."""
    generator = saying(SENTENCE)
    tokens = TOKENIZER(SENTENCE).input_ids
    prompts = [[1], [5, 1], [1, tokens[0], tokens[1]], [tokens[-1]]]
    batch = write(generator, Decoding(stop=("counted",)), start(generator, *prompts))
    alone = [write(generator, Decoding(stop=("counted",)), start(generator, p)) for p in prompts]
    assert batch.texts == [generation.texts[0] for generation in alone]
    assert batch.num_tokens == [generation.num_tokens[0] for generation in alone]
    assert batch.finish_reasons == ["stop", "stop", "stop", "eos"]


STOPS = [("counted",), (), ("light", "T")]


def test_each_row_ends_at_its_own_stop_texts() -> None:
    generation = Generation(
        generator := saying(SENTENCE), start(generator, [1], [1], [1]), Decoding(), STOPS
    )
    pieces = ["".join(row) for row in zip(*generation, strict=True)]
    assert pieces == generation.texts == ["The lighthouse keeper ", SENTENCE, ""]
    assert generation.finish_reasons == ["stop", "eos", "stop"]


@pytest.mark.parametrize(("stop", "expected"), [((), SENTENCE), (("keeper",), "The lighthouse ")])
def test_explicit_stop_texts_take_the_place_of_the_rows(
    parrot: Generator, stop: tuple[str, ...], expected: str
) -> None:
    generation = Generation(parrot, start(parrot, [1], [1], [1]), Decoding(stop=stop), STOPS)
    assert list(generation)
    assert generation.texts == [expected] * 3


def test_stop_texts_of_another_number_of_rows_are_refused(parrot: Generator) -> None:
    with pytest.raises(ValueError, match="expected stop texts of 1 rows, got those of 3"):
        Generation(parrot, start(parrot), Decoding(), STOPS)


def test_a_token_the_model_config_names_ends_the_answer_too() -> None:
    generator = saying(SENTENCE)
    generator.model.generation_config.eos_token_id = [0, TOKENIZER(SENTENCE).input_ids[3]]
    generation = write(generator, Decoding())
    assert generation.finish_reasons == ["eos"]
    assert generation.num_tokens == [4]


def test_the_answer_is_readable_while_it_is_written(parrot: Generator) -> None:
    generation = Generation(parrot, start(parrot), Decoding())
    assert (generation.texts, generation.finish_reasons) == ([""], [None])
    (first,) = next(iter(generation))
    assert generation.texts == [first]
    assert generation.num_tokens == [1]
    assert generation.finish_reasons == [None]


# --- choosing


def sampled(generator: Generator, **changes: Any) -> str:
    settings = {"max_new_tokens": 24, "temperature": 1.0, "seed": 7, **changes}
    prompt = start(generator, generator.tokenize(PROSE[0]))
    return write(generator, Decoding(**settings), prompt).texts[0]


def test_a_seed_makes_sampling_repeatable(llama: Generator) -> None:
    torch.manual_seed(0)
    one = sampled(llama)
    torch.manual_seed(1)
    assert sampled(llama) == one
    assert sampled(llama, seed=8) != one


def test_sampling_without_a_seed_takes_torchs_state(llama: Generator) -> None:
    torch.manual_seed(3)
    one = sampled(llama, seed=None)
    assert sampled(llama, seed=None) != one
    torch.manual_seed(3)
    assert sampled(llama, seed=None) == one


def test_a_seed_leaves_torchs_state_alone(llama: Generator) -> None:
    state = torch.get_rng_state()
    sampled(llama)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}], ids=["k", "p", "temperature"]
)
def test_sampling_from_the_likeliest_token_alone_is_greedy(
    llama: Generator, narrow: dict[str, Any]
) -> None:
    greedy = sampled(llama, temperature=0.0, seed=None)
    assert sampled(llama) != greedy
    assert sampled(llama, **narrow) == greedy


@pytest.mark.parametrize("changes", [{"top_k": 3}, {"top_p": 0.5}, {"temperature": 0.3}])
def test_each_setting_changes_what_is_sampled(llama: Generator, changes: dict[str, Any]) -> None:
    assert sampled(llama, **changes) != sampled(llama)


def test_a_half_precision_model_can_be_sampled() -> None:
    generator = Generator(make_model("llama").to(torch.bfloat16), TOKENIZER)
    assert sampled(generator) == sampled(generator)


# --- leaving and sharing


@pytest.mark.parametrize("taken", [1, 3])
def test_leaving_the_loop_runs_no_further_pass(llama: Generator, taken: int) -> None:
    generation = Generation(llama, start(llama, [1, 9, 8]), Decoding())
    with passes_of(llama) as passes:
        for step, _ in enumerate(generation, start=1):
            if step == taken:
                break
    assert passes == [3] + [1] * (taken - 1)
    assert generation.num_tokens == [taken]


def test_nothing_runs_before_the_first_piece_is_asked_for(llama: Generator) -> None:
    with passes_of(llama) as passes:
        iter(Generation(llama, start(llama), Decoding()))
    assert passes == []


def test_the_prompt_is_read_in_one_pass_and_each_token_in_one(llama: Generator) -> None:
    ids = llama.tokenize(PROSE[0])
    with passes_of(llama) as passes:
        write(llama, Decoding(max_new_tokens=4), start(llama, ids))
    assert passes == [len(ids), 1, 1, 1]


def test_a_paused_stream_leaves_the_model_to_others(
    make_generator: Callable[..., Generator],
) -> None:
    generator = make_generator("llama")
    compressor = make_compressor(generator, "sac")
    expected = write(generator, Decoding(max_new_tokens=8), start(generator, [1, 5, 9])).texts
    kv_alone = compressor.compress([PROSE[0]])[0]
    generation = Generation(generator, start(generator, [1, 5, 9]), Decoding(max_new_tokens=8))
    for _ in generation:
        (kv,) = elsewhere(lambda: compressor.compress([PROSE[0]]))
        assert kv.bit_equal(kv_alone)
    assert generation.texts == expected


# --- _Writer


def pieces_of(ids: Sequence[int], stop: Sequence[str] = ()) -> tuple[list[str], _Writer]:
    writer = _Writer(TOKENIZER, tuple(stop))
    pieces = []
    for token in ids:
        pieces.append(writer.feed(token))
        if writer.stopped:
            return pieces, writer
    return [*pieces, writer.flush()], writer


def ids_of(text: str) -> list[int]:
    ids: list[int] = TOKENIZER(text, split_special_tokens=True).input_ids
    return ids


@pytest.mark.parametrize("text", MULTI_BYTE)
def test_characters_of_several_tokens_are_given_whole(text: str) -> None:
    ids = ids_of(text)
    assert len(ids) > len(text.split())
    pieces, writer = pieces_of(ids)
    assert "".join(pieces) == writer.text == text.lstrip()
    broken = "\N{REPLACEMENT CHARACTER}"
    assert "".join(pieces).count(broken) == text.count(broken)


def test_a_character_is_given_as_soon_as_it_is_complete() -> None:
    ids = ids_of("🚀!")
    pieces, _ = pieces_of(ids)
    assert pieces == ["", "", "", "🚀", "!", ""]


@settings(deadline=None)
@given(text=st.text())
def test_pieces_joined_are_the_text(text: str) -> None:
    pieces, writer = pieces_of(ids_of(text))
    assert "".join(pieces) == writer.text == text.lstrip()


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 511)))
def test_pieces_joined_are_what_the_tokenizer_decodes(ids: list[int]) -> None:
    """Any tokens, also such as are no text: a random model writes them, and a good one may."""
    pieces, writer = pieces_of(ids)
    assert "".join(pieces) == writer.text
    assert writer.text == TOKENIZER.decode(ids, skip_special_tokens=True).lstrip()


@settings(deadline=None)
@given(
    text=st.text(alphabet="ab 🚀é\n", max_size=40),
    stop=st.text(alphabet="ab 🚀é\n", min_size=1, max_size=4),
)
def test_a_text_is_cut_at_its_first_stop_text_that_ends_behind_its_first_word(
    text: str, stop: str
) -> None:
    pieces, writer = pieces_of(ids_of(text), [stop])
    blank = len(text) - len(text.lstrip())
    cuts = [i for i in range(len(text)) if text.startswith(stop, i) and i + len(stop) > blank]
    assert "".join(pieces) == writer.text == text[: cuts[0] if cuts else None].lstrip()
    assert writer.stopped == bool(cuts)


@pytest.mark.parametrize("text", [" Mabel Strand", "  Mabel Strand", "\n\t Mabel Strand"])
def test_white_space_before_an_answer_is_no_part_of_it(text: str) -> None:
    pieces, writer = pieces_of(ids_of(text))
    assert "".join(pieces) == writer.text == "Mabel Strand"


def test_white_space_inside_and_behind_an_answer_stays() -> None:
    pieces, writer = pieces_of(ids_of(" a  b\n c \n"))
    assert "".join(pieces) == writer.text == "a  b\n c \n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" Mabel Strand\nQuestion: Who", "Mabel Strand"),
        ("\nMabel Strand\nQuestion: Who", "Mabel Strand"),
        ("\n\n Mabel Strand\n", "Mabel Strand"),
        (" \n a\n", "a"),
    ],
)
def test_a_stop_text_before_the_first_word_does_not_end_an_answer(text: str, expected: str) -> None:
    pieces, writer = pieces_of(ids_of(text), ["\n", "\n\n"])
    assert "".join(pieces) == writer.text == expected
    assert writer.stopped


def test_a_stop_text_that_has_the_first_word_in_it_ends_an_answer() -> None:
    """Else the answer would be the next question."""
    pieces, writer = pieces_of(ids_of("\n\nQuestion: Who?"), ["\n", "\nQuestion:"])
    assert "".join(pieces) == writer.text == ""
    assert writer.stopped


def test_white_space_alone_is_an_empty_answer_that_no_stop_text_ends() -> None:
    pieces, writer = pieces_of(ids_of(" \n\n"), ["\n"])
    assert "".join(pieces) == writer.text == ""
    assert not writer.stopped


@settings(deadline=None)
@given(
    text=st.text(alphabet="ab🚀", max_size=40),
    stops=st.lists(st.text(alphabet="ab🚀", min_size=1, max_size=4), min_size=1, max_size=4),
)
def test_no_stop_text_is_ever_given_out(text: str, stops: list[str]) -> None:
    pieces, writer = pieces_of(ids_of(text), stops)
    so_far = ""
    for piece in pieces:
        so_far += piece
        assert not any(stop in so_far for stop in stops)
        assert text.startswith(so_far)
    assert so_far == writer.text
    assert writer.stopped == any(stop in text for stop in stops)
    assert writer.stopped or so_far == text


def test_a_stop_text_is_found_in_a_token_that_also_begins_a_character() -> None:
    """One token may end a stop text and hold the first bytes of a character that never comes."""
    tokenizer = make_tokenizer()
    half = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("🚀")[0][0][:2]
    tokenizer.add_tokens(["." + half])
    writer = _Writer(tokenizer, (".",))
    assert writer.feed(tokenizer("a").input_ids[0]) == "a"
    piece = writer.feed(tokenizer.convert_tokens_to_ids("." + half))
    assert "." not in piece + writer.flush()


def test_what_was_held_back_comes_at_the_end() -> None:
    pieces, writer = pieces_of(ids_of("a STO"), ["STOP"])
    assert "".join(pieces[:-1]) == "a "
    assert pieces[-1] == "STO"
    assert not writer.stopped


def test_special_tokens_are_not_shown() -> None:
    pieces, _ = pieces_of([*ids_of("a"), 2, *ids_of("b"), 1, 0])
    assert "".join(pieces) == "ab"


def sentencepiece_like() -> Any:
    """Spaces as part of words, bytes as tokens of their own: how Llama 2 and Mistral decode."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    of_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", *of_bytes], show_progress=False
    )
    tokenizer.train_from_iterator(PROSE, trainer)
    description = json.loads(tokenizer.to_str())
    description["added_tokens"] = description["added_tokens"][:1]  # bytes are ordinary tokens
    tokenizer = Tokenizer.from_str(json.dumps(description))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize("text", [*PROSE[:2], " two  spaces ", "naïve 🚀 كم", "a\nb"])
def test_spaces_and_bytes_of_other_tokenizers_come_out_right(text: str) -> None:
    tokenizer = sentencepiece_like()
    ids = tokenizer(text).input_ids
    writer = _Writer(tokenizer, ())
    pieces = [*map(writer.feed, ids), writer.flush()]
    assert "".join(pieces) == writer.text == tokenizer.decode(ids, skip_special_tokens=True)
    assert writer.text.strip() == text.strip()
