"""The kit itself: each wrong backend is caught by the check that names what is wrong, in words that an author can use."""

import contextlib
from dataclasses import replace

import pytest

from fusion_core.samples.sites import resized
from fusion_core.testing import CHECKS, CheckFailed, CheckNotApplicable, Values, example_site, jobs, subjects

RUN = {check.name: check.run for check in CHECKS}

# backend, the check that names its fault, words of the message
CAUGHT = [
    ("does_nothing", "equals_the_oracle_where_it_accepts", "is wrong in row"),
    ("has_an_epsilon_of_its_own", "equals_the_oracle_where_it_accepts", "normed is wrong in row"),
    ("forgets_weight_bias", "equals_the_oracle_where_it_accepts", "normed is wrong in row"),
    ("forgets_residual", "equals_the_oracle_where_it_accepts", "is wrong in row"),
    ("rounds_the_residual", "equals_the_oracle_where_it_accepts", "is wrong in row"),
    ("sums_in_bf16", "equals_the_oracle_where_it_accepts", "is wrong in row"),
    ("swaps_outputs", "equals_the_oracle_where_it_accepts", "is wrong in row"),
    ("lets_a_bad_row_spread", "equals_the_oracle_where_it_accepts", "normed is wrong in row"),
    ("accepts_any_stride", "equals_the_oracle_where_it_accepts", "strided"),
    ("accepts_any_size", "equals_the_oracle_where_it_accepts", "this kernel needs a multiple of 8"),
    ("dies_on_one_rank", "equals_the_oracle_where_it_accepts", "rank 1 of 2 failed"),
    ("returns_too_little", "declares_what_the_definition_gives", "returns 1 values, needs 3: normed, residual_out, reduced"),
    ("gives_another_dtype", "declares_what_the_definition_gives", "gives normed as float64[4, 256], needs bfloat16[4, 256]"),
    ("lies_about_dtypes", "declares_what_the_definition_gives", "the fake gives normed as float64[4, 256], needs bfloat16"),
    ("has_no_fake", "declares_what_the_definition_gives", "this kernel has no fake"),
    ("lies_about_shapes", "fake_matches_real", "the fake gives normed as bfloat16[1024]"),
    ("lies_about_strides", "fake_matches_real", "the fake gives normed as bfloat16[4, 256] on cpu, strides [512, 2]"),
    ("returns_an_input", "fake_matches_real", "residual_out is in the memory of residual, needs memory of its own"),
    ("hides_a_write", "fake_matches_real", "torch.library.opcheck raises"),
    ("mutates_an_input", "leaves_its_inputs_alone", "it writes into residual"),
    ("writes_into_the_gaps", "leaves_its_inputs_alone", "it writes into x"),
    ("hides_a_write", "leaves_its_inputs_alone", "it writes into residual"),
    ("accepts_everything", "refuses_on_the_wrong_side_of_each_requirement", "requirement 'x in bfloat16' is not met here and does not refuse"),
    ("refuses_without_a_word", "refuses_on_the_wrong_side_of_each_requirement", "needs a Reason with code and found"),
    ("has_a_strange_requirement", "refuses_on_the_wrong_side_of_each_requirement", "@fusion_core.testing.sides.register"),
    ("refuses_everything", "refuses_on_the_wrong_side_of_each_requirement", "is met here and refuses: something was found"),
    ("refuses_everything", "accepts_its_own_example", "it accepts no example"),
    ("contradicts_itself", "accepts_its_own_example", "x.shape[-1] is 256, needs 1 to 7"),
    ("has_a_pattern_without_example", "accepts_its_own_example", "cannot make up the tensor 'shift', needs pattern(example=...)"),
    ("has_no_fake", "stands_in_the_compiled_graph", "this kernel has no fake"),
    ("holds_a_tensor", "stands_in_the_compiled_graph", "it is not in the compiled graph"),
    ("takes_four_dimensions_for_three", "takes_any_number_of_dimensions_or_refuses", "is wrong in row"),
    ("differs_between_ranks", "gives_the_same_bits_on_every_rank", "normed has other bits than on rank 0"),
    ("differs_between_batches", "gives_a_row_the_same_bits_in_every_batch", "the first row of normed has other bits in batches of"),
    ("returns_its_workspace", "can_be_repeated_and_used_in_two_groups", "call 1 of 6, in turn on two groups: a later call overwrote normed, needs memory of its own"),
    ("knows_one_group", "can_be_repeated_and_used_in_two_groups", "call 2 of 6"),
    ("is_wrong_beyond_1024_rows", "is_right_at_large_sizes_and_at_its_bounds", "normed is wrong in row 1024"),
    ("is_wrong_at_its_most_tokens", "is_right_at_large_sizes_and_at_its_bounds", "x=bfloat16[700, 256]"),
    ("is_wrong_at_its_widest", "is_right_at_large_sizes_and_at_its_bounds", "x=bfloat16[4, 5120]"),
    ("is_wrong_at_hidden_16384", "is_right_at_large_sizes_and_at_its_bounds", "x=bfloat16[2, 16384]"),
    ("is_wrong_at_four_ranks", "is_right_at_every_world_size", "on 4 ranks of cpu"),
    ("adds_its_own_part_first", "gives_the_same_bits_on_every_rank", "x=float32[4, 256]"),
    ("forgets_the_sum_without_a_workspace", "goes_on_where_a_workspace_fails", "where create raises on one rank: "),
    ("has_a_row_where_there_is_none", "takes_no_rows_or_refuses", "gives normed as bfloat16[1, 256], needs bfloat16[0, 256]"),
]  # fmt: skip


def subject_of(name, examples=40):
    (subject,) = subjects("wrong", f"tests.testing.wrong_backends:{name}", examples)
    return subject


@pytest.mark.parametrize(("name", "check", "words"), CAUGHT, ids=[f"{name}-{check}" for name, check, _ in CAUGHT])
def test_a_wrong_backend_is_caught_by_the_check_that_names_its_fault(name, check, words):
    with pytest.raises(CheckFailed) as caught:
        RUN[check](subject_of(name))
    assert words in str(caught.value)
    assert str(caught.value).startswith("wrong.")


@pytest.mark.parametrize(
    ("name", "check"), [(name, check) for name, check, _ in CAUGHT if check.startswith("is_right_at")]
)
def test_what_is_wrong_at_one_size_alone_passes_where_generated_sites_are_compared(name, check):
    RUN["equals_the_oracle_where_it_accepts"](subject_of(name, 20))


@pytest.mark.parametrize("check", list(RUN))
@pytest.mark.parametrize("name", ["fine", "fine_operator"])
def test_a_right_backend_is_caught_by_none(name, check):
    with contextlib.suppress(CheckNotApplicable):
        RUN[check](subject_of(name))


def test_a_strategy_behind_an_option_is_tested_where_the_user_switched_it_on(monkeypatch):
    assert subjects("wrong", "tests.testing.wrong_backends:fine_if_switched_on") == ()
    monkeypatch.setenv("FUSION_CORE_OPTIONS", "acme.fast,wrong.switch")  # the first of a backend that is not under test
    RUN["stands_in_the_compiled_graph"](subject_of("fine_if_switched_on"))


@pytest.mark.usefixtures("one_rank")
def test_an_operator_may_be_given_two_sizes_of_0():
    """What `torch.library.opcheck` itself cannot copy is no fault of the operator."""
    subject = subject_of("fine_operator")
    site = replace(resized(subject.pattern, example_site(subject.pattern), (0, 0, 64)), world_size=1)
    assert jobs.fakes_and_results(subject, site, Values()) == []


@pytest.mark.parametrize("check", ["declares_what_the_definition_gives", "fake_matches_real"])
def test_an_impl_that_takes_a_setting_is_given_it(check):
    RUN[check](subject_of("takes_a_setting"))


def test_every_check_catches_some_wrong_backend():
    assert {check for _, check, _ in CAUGHT} == set(RUN)
