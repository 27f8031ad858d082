"""Which tests run in which tier: the first is a sample that ends in ten minutes on two cores, the third is everything.

| tier | command           | here                                                          |
|------|-------------------|---------------------------------------------------------------|
| 1    | `make test`       | every claim, with a sample of its cases                       |
| 2    | `make proofs`     | more cases, lessons, the browser, samples of the large tables |
| 3    | `make exhaustive` | all other cases                                               |

What a tier leaves out is listed here; every case runs in exactly one tier.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """Of the cases of a test, every `first`-th runs in the first tier and every `second`-th of all in the second.

    The other cases run in the third tier. With 0, none runs in that tier.
    """

    first: int
    second: int = 0

    def tier(self, index: int) -> int:
        """Return the tier of the case with this index."""
        for tier, every in ((1, self.first), (2, self.second)):
            if every and index % every == 0:
                return tier
        return 3


SAMPLES = {
    # Layouts, methods and formats multiply: the second tier has a sample of the whole matrix, too.
    "test_a_layout_computes_what_one_process_computes": Sample(10, 5),
    "test_half_precision_stays_close_to_itself_and_is_on": Sample(6, 3),
    "test_passes_and_clipping_keep_it_equal": Sample(3),
    "test_so_does_that_of_a_pipeline_of_tied_weights_and_of_experts": Sample(0, 3),
    "test_a_checkpoint_goes_on_in_any_other_layout": Sample(0, 1),
    "test_all_ranks_of_a_spread_model_stop_at_the_same_step_and_go_on": Sample(2),
    "test_a_run_with_parameters_that_never_had_a_gradient_goes_on_in_any_layout": Sample(2),
    "test_a_resumed_run_repeats_the_whole_one": Sample(8, 4),
    "test_on_a_layout_it_learns_the_same_up_to_rounding_or_is_refused": Sample(6, 3),
    "test_replicas_stay_equal": Sample(8, 4),
    "test_a_sparse_run_leaves_its_forms": Sample(0, 3),
    "test_so_do_the_other_methods": Sample(6, 3),
    "test_as_many_weights_are_zero_as_were_asked_for": Sample(3),
    "test_every_layout_trains_the_same_sparse_network": Sample(10, 5),
    "test_less_and_less_changes_and_then_nothing": Sample(2),
    "test_its_limit_is_synchronous_training": Sample(3),
    "test_options_keep_what_it_computes": Sample(3),
    "test_the_trained_network_is_quantized_beside_itself": Sample(2),
    "test_other_trainings_are_quantized_too": Sample(0, 1),
    "test_a_network_trained_for_its_grid_loses_nothing_when_it_is_put_there": Sample(0, 1),
    "test_with_nothing_left_out_every_method_gives_the_mean": Sample(2),
    "test_tracing_changes_no_number": Sample(3),
    "test_a_reported_metric_is_that_of_the_saved_model": Sample(3),
    "test_so_is_that_of_torchs_own_losses": Sample(3),
    "test_compressors_train_what_is_used_late_or_never": Sample(3),
    "test_what_no_rank_uses_in_an_update_stays_as_it_is": Sample(2),
    "test_a_running_mean_is_that_of_the_whole_batch": Sample(3),
    "test_the_bytes_that_leave_are_those_of_the_formula": Sample(2),
    "test_losses_of_probabilities_are_computed_in_float32": Sample(2),
    "test_losses_are_the_same_to_the_last_bit_without_a_rehearsal": Sample(0, 1),
    "test_a_resumed_run_goes_on_exactly": Sample(2),
    # What takes seconds because processes start, wait, or are waited for.
    "test_a_killed_rank_ends_the_run_by_name": Sample(8, 4),
    "test_a_rank_that_leaves_with_the_code_of_a_stop_ends_the_run_by_name": Sample(3),
    "test_stop_reaches_ranks_that_are_ahead_in_time": Sample(8, 4),
    "test_stop_saves_what_all_have_done_and_a_resumed_run_goes_on_from_there": Sample(6, 3),
    "test_the_straggler_is_named_though_all_steps_take_as_long": Sample(2),
    "test_what_hangs_is_named_within_bounds": Sample(2),
    "test_every_fault_ends_well": Sample(3),
    "test_a_rank_that_floods_its_log_neither_blinds_nor_fills_the_supervisor": Sample(2),
    "test_a_full_disk_ends_the_run_by_name": Sample(0, 1),
    "test_whatever_is_killed_leaves_no_folder_of_its_loader_processes": Sample(3),
    "test_a_resumed_run_repeats_the_uninterrupted_one": Sample(3),
    "test_a_resume_that_is_not_exact_says_so": Sample(4),
    "test_a_resumed_run_has_the_very_same_losses": Sample(2),
    "test_a_signal_to_the_command_stops_its_run": Sample(2),
    "test_a_signal_stops_the_run_and_keeps_the_rest": Sample(3),
    "test_a_run_that_outlives_its_sweep_is_waited_for": Sample(0, 1),
    "test_a_run_that_its_sweep_could_not_note_is_found_again": Sample(0, 1),
    "test_one_process_at_a_time_runs_a_sweep": Sample(0, 1),
    "test_a_run_whose_figures_cannot_be_printed_was_launched_all_the_same": Sample(3),
    "test_a_file_in_the_current_folder_stands_in_for_no_library": Sample(0, 1),
    "test_the_counters_show_what_methods_send": Sample(10, 5),
    # Proofs of the proofs.
    "test_a_broken_average_fails_the_proof": Sample(4, 2),
    "test_a_model_that_float64_overflows_is_proved_in_float32": Sample(0, 1),
    "test_what_is_switched_off_does_not_pass": Sample(5),
    "test_the_table_and_the_command": Sample(0, 1),
    "test_the_command_writes_the_table": Sample(0, 1),
    "test_ctrl_c_prints_what_is_there": Sample(0, 1),
    # Trainings that have to learn something.
    "test_it_learns_more_than_the_majority_action": Sample(0, 1),
    "test_a_short_training_beats_the_unigram_entropy": Sample(0, 1),
    # Examples of the reference pages.
    "test_the_example_of_an_own_method_runs": Sample(2),
}
"""Tests that do not run whole in the first tier, by name; those that never do are marked `slow` or `exhaustive`."""
