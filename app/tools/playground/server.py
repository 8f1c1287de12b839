"""The playground's server."""

import sys

from app.runs.checkpoints import missing_run_error
from app.settings.settings import Settings
from app.tools.web.server import listen, serve


def playground(settings: Settings) -> None:
    """Serve the page until a signal ends it.

    Raises:
        UserError: the address or the port cannot be listened on.
    """
    cfg = settings.playground
    problem = ""
    if settings.train.run_name and not settings.run_dir.is_dir():
        missing = missing_run_error(settings.run_dir)
        problem = f"{missing.problem}: {missing.fix}"
        print(f"warning: {problem}", file=sys.stderr, flush=True)
    with listen(cfg.host, cfg.port, cfg.prefix()) as listener:
        # Imported after the port is bound, because torch takes seconds.
        from app.hardware.device import select_device
        from app.tools.playground.generator import Generator
        from app.tools.playground.routes import build_app

        device = select_device(settings.train.device, "float32", "auto")
        generator = Generator(settings.general.data_dir / "runs", device)

        def end_text() -> None:
            generator.is_closing = True

        app, what = build_app(generator, settings, problem), f"the models in {generator.runs_dir}"
        serve(app, listener, cfg.host, what, before_exit=end_text)
