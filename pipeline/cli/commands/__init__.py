"""The commands besides those that run a recipe or a search: their arguments, their options and what they print."""

from firstlight.pipeline.cli.commands.image_commands import init_recipe, look_at_folder, predict_images
from firstlight.pipeline.cli.commands.machine_commands import check_machine, submit_recipe
from firstlight.pipeline.cli.commands.run_commands import (
    compare_runs,
    delete_run,
    open_ui,
    print_runs,
    promote_run,
    push_export,
    repeat_run,
    show_run,
)

COMMANDS = (
    init_recipe,
    look_at_folder,
    print_runs,
    show_run,
    compare_runs,
    promote_run,
    delete_run,
    repeat_run,
    open_ui,
    push_export,
    predict_images,
    check_machine,
    submit_recipe,
)
