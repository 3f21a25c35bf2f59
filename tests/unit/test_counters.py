"""Counters and histograms count what Prometheus would."""

from __future__ import annotations

import threading

from runrecovery_service.metric_counters import Counter, Histogram, Meters, SharedCounter


def test_a_value_on_a_bound_is_in_the_bucket_of_the_bound() -> None:
    histogram = Histogram("h", "help", "engine", bounds=(1.0, 2.0))

    for value in (0.5, 1.0, 1.5, 2.0, 2.5):
        histogram.observe(value, "e")

    assert histogram.series == {("e",): [2, 2, 1, 7.5]}


def test_a_histogram_without_labels_shows_zeros_before_its_first_value() -> None:
    assert Histogram("h", "help", bounds=(1.0,)).series == {(): [0, 0, 0]}


def test_a_counter_shows_zero_only_where_it_is_asked_to_and_keeps_its_count() -> None:
    counter = Counter("c_total", "help", "code")
    counter.add("A")
    counter.add("A")

    counter.show_zero("A")
    counter.show_zero("B")

    assert counter.values == {("A",): 2, ("B",): 0}


def test_a_shared_counter_loses_nothing_between_threads() -> None:
    counter = SharedCounter("c_total", "help")

    def count() -> None:
        for _ in range(5_000):
            counter.add()

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert counter.values == {(): 20_000}


def test_two_services_in_one_process_share_no_numbers() -> None:
    first, second = Meters(), Meters()

    first.output_lost.add("e")

    assert second.output_lost.values == {}
    assert [meter.name for meter in first] == [meter.name for meter in second]
