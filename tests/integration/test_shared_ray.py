"""The Ray cluster that tests share is the same one after a test that shut Ray down."""

import pytest


@pytest.mark.ray
def test_shared_cluster_has_four_cpus_again_after_a_test_without_ray(
    ray_free: None, request: pytest.FixtureRequest
) -> None:
    import ray

    assert not ray.is_initialized()
    request.getfixturevalue("ray_local")
    assert ray.cluster_resources()["CPU"] == 4
