"""Publisher of reconstructions."""

from firstlight.pipeline.report import image_figures
from firstlight.pipeline.report.publish.figure_log import FigureLog
from firstlight.pipeline.report.publish.publisher import StagePublisher
from firstlight.pipeline.stages.pictures import PICTURES_FILE, load_pictures
from firstlight.pipeline.stages.sections.reconstruct import Reconstruct
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.tracking.client import TrackingClient
from firstlight.pipeline.train.context import StageContext


class ReconstructPublisher(StagePublisher[Reconstruct]):
    """Publishes the ratio, and figures of reconstructed images and of features."""

    def publish(
        self,
        tracking: TrackingClient,
        run_id: str,
        context: StageContext,
        stage: Reconstruct,
        instance: StageInstance,
    ) -> None:
        result = instance.result
        assert result is not None
        tracking.log_results(run_id, {f"psnr_{split}": value for split, value in result["psnr"].items()})
        tracking.client.log_dict(run_id, result, "result.json")
        figure_log = FigureLog(tracking, run_id, instance.folder)
        for grid in load_pictures(instance.folder / PICTURES_FILE):
            figure_log.add(grid.name, image_figures.draw_image_grid(grid), grid.title)
