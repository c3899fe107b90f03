"""What a sidecar says over HTTP."""

from __future__ import annotations

import urllib.error
import urllib.request

from prometheus_client.parser import text_string_to_metric_families


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:  # a URL of this test's own sidecar
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def metrics(url: str) -> dict[tuple[str, str], float]:
    """(name, its labels' values joined in the order of the labels' names) -> value."""
    status, text = get(f"{url}/metrics")
    assert status == 200
    return {
        (sample.name.removeprefix("torchrank_sidecar_"), ",".join(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
