"""Train the recipe demo with two learning rates, and compare the held-out losses."""

from gpt_compose import prepare, train

prepare(recipe="demo")
runs = {
    rate: train(recipe="demo", run_name=f"demo-{rate}", learning_rate=rate)
    for rate in (5e-3, 1.5e-2)
}

print("\nlearning rate  step  training loss  held-out loss")
for rate, run in runs.items():
    for record in run.metrics:
        if record.val_loss is not None:
            losses = f"{record.train_loss:13.4f}  {record.val_loss:13.4f}"
            print(f"{rate:13g}  {record.step:4}  {losses}")
