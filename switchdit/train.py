"""Train a diffusion transformer with DeepSpeed.

deepspeed [launcher options] switchdit/train.py --config switchdit/configs/X.yaml --deepspeed_config ds_configs/Y.json
          [--resume auto|PATH] [section.key=value ...]
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

if __package__ in (None, ""):  # the launcher runs this as a file: import from the repository root, not from switchdit/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from switchdit.config import Config, config_to_dict, load_config
from switchdit.errors import EXIT_REQUEUE, UserError, exit_on_user_error, run_and_end
from switchdit.progress import outlive_terminal, progress, say
from switchdit.stop_signals import note_stop_signals, stop_requested


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], usage=__doc__.split("\n\n")[1], allow_abbrev=False
    )
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("--deepspeed_config", required=True, help='JSON file of DeepSpeed, with "auto" values')
    parser.add_argument("--resume", help="'auto': from the run's newest checkpoint if it has one; or a checkpoint")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the YAML's")
    return parser.parse_intermixed_args()  # overrides may stand between options


@exit_on_user_error
def main() -> None:
    args = arguments()
    config = load_config(args.config, args.overrides)
    note_stop_signals()
    outlive_terminal()
    train(config, args.deepspeed_config, args.resume)


def train(config: Config, deepspeed_config_path: str, resume: str | None) -> None:
    import torch

    from switchdit.data.autoencoder import load_autoencoder
    from switchdit.data.compatibility import check_latents
    from switchdit.data.latent_dataset import LatentDataset
    from switchdit.data.latent_shards import MANIFEST
    from switchdit.data.training_batches import TrainingBatches
    from switchdit.deepspeed_config import micro_batch_of, resolve_deepspeed_config
    from switchdit.engine.checkpoint import Checkpoints, load_checkpoint
    from switchdit.engine.checkpoint_folder import remove_partial_checkpoints
    from switchdit.engine.compilation import check_compiler, compile_blocks
    from switchdit.engine.ema import Ema
    from switchdit.engine.engine import (
        add_over_processes,
        agree,
        barrier,
        build_engine,
        check_same,
        from_first,
        grad_norm,
        init_processes,
        leave,
        on_gpu,
        set_optimizer,
        wait_long,
    )
    from switchdit.engine.faults import Notices, SpikeDetector, Updates, compare_parameters, poisoned
    from switchdit.engine.generate import check_sampling, sample_grid
    from switchdit.engine.layer_norm import check_layer_norm, use_apex_layer_norm
    from switchdit.engine.monitors import Monitor
    from switchdit.engine.objective import Objective, check_objective, time_distribution
    from switchdit.engine.optimizers import apex_fused_adam, described
    from switchdit.engine.ownership import Ownership
    from switchdit.engine.run_directory import (
        candidates,
        check_unchanged,
        choose_start,
        put_aside,
        versions,
        write_run_files,
    )
    from switchdit.engine.watchdog import Watchdog
    from switchdit.files import sha256_of
    from switchdit.models import build_model, model_fields, parameter_counts, system_of
    from switchdit.moe.dispatch import check_dispatch, set_dispatch

    # Validate: everything that can be wrong is found before anything is written, and by all processes alike.
    processes = init_processes()
    watchdog = Watchdog(processes, config.faults.hang_timeout, config.faults.peer_timeout)
    notices = Notices()

    def validate() -> tuple:
        fields = model_fields(config.model_name, **config.model_overrides)
        check_objective(config, fields["num_timesteps"])
        check_dispatch(config.moe.dispatch, system_of(config.model_name))
        if (every := config.train.activation_checkpointing) > fields["depth"]:
            raise UserError(f"train.activation_checkpointing is {every}; the model has {fields['depth']} blocks")
        deepspeed_config = resolve_deepspeed_config(deepspeed_config_path, config, processes.world_size, on_gpu())
        if config.optimizer.backend == "apex":
            apex_fused_adam()
        if config.train.compile:
            check_compiler("train.compile", system_of(config.model_name), processes.device)
        check_layer_norm(config.train.layer_norm, config.train.compile, processes.device)
        dataset = LatentDataset(config.data.latents)
        check_latents(dataset, config.data, fields)
        if config.monitor.sample_every:
            has_null_label = fields["class_dropout_prob"] > 0
            check_sampling(config.sample, fields["in_channels"], fields["num_timesteps"], has_null_label)
            if processes.is_first:
                load_autoencoder(config.data.vae)  # not needed yet: a missing one is told now
        return fields, deepspeed_config, dataset, candidates(config, resume)

    fields, deepspeed_config, dataset, found = agree(validate)
    version, manifest = versions(), sha256_of(dataset.path / MANIFEST)
    check_same(
        config=config_to_dict(config),
        deepspeed_config=deepspeed_config,
        latents=manifest,
        version=version,
        resume=resume,
    )
    start = choose_start(config, from_first(found), resume)

    # Build.
    torch.manual_seed(config.train.seed)
    model = build_model(config.model_name, **config.model_overrides)
    model.activation_checkpointing = config.train.activation_checkpointing
    if config.train.compile:
        compile_blocks(model)
    if config.train.layer_norm == "apex":
        use_apex_layer_norm(model)
    micro_batch = micro_batch_of(config, processes.world_size)
    in_bf16 = deepspeed_config.get("bf16", {}).get("enabled", False)
    dispatch = set_dispatch(model, config.moe.dispatch, samples=micro_batch, itemsize=2 if in_bf16 else 4)
    objective = Objective(config, model, processes.device)
    engine = build_engine(model, deepspeed_config, config.optimizer.backend)
    ema = Ema(engine, config.train.ema_decay)
    about = {
        "model": {"name": config.model_name, **{k: v for k, v in fields.items() if k != "ep_size"}},
        "diffusion": asdict(config.diffusion),
        "loss": objective.identity,
        "vae_sha256": dataset.vae_sha256,
        "run": {
            "seed": config.train.seed,
            "global_batch": config.train.global_batch,
            "latents": manifest,
        },
    }
    first_step, extra = load_checkpoint(start.checkpoint, engine, ema, about) if start.checkpoint else (0, None)
    if extra:
        objective.restore(extra["objective"])
    run_dir = Path(config.run_dir)
    barrier()  # every process has read before the first one writes
    if processes.is_first:
        write_run_files(config, deepspeed_config, processes.world_size)
    barrier()
    owner = Ownership(run_dir, processes.is_first)
    agree(lambda: check_unchanged(config, resume, found) if processes.is_first else None)
    if processes.is_first:
        put_aside(start)
        remove_partial_checkpoints(run_dir / "checkpoints")
    barrier()
    done = first_step
    checkpoints = Checkpoints(
        run_dir / "checkpoints",
        engine,
        ema,
        config.monitor.keep_last,
        config.monitor.keep_every,
        owner,
        on_progress=lambda: watchdog.reached("checkpoint", done),
    )
    log_every = config.monitor.log_every
    monitor = Monitor(run_dir, processes, model.num_timesteps, config.train.global_batch, log_every, first_step)
    spikes, skipped_in_a_row = SpikeDetector(config.faults.spike_sigma), 0
    if extra:
        monitor.restore(extra["monitor"])
        spikes.restore(extra.get("spikes", spikes.state()))
        skipped_in_a_row = extra.get("skipped_in_a_row", 0)
    batches = TrainingBatches(
        dataset,
        seed=config.train.seed,
        rank=processes.rank,
        world_size=processes.world_size,
        micro_batch=micro_batch,
        accumulation=config.train.gradient_accumulation_steps,
        num_timesteps=model.num_timesteps,
        label_dropout=model.class_dropout_prob,
        horizontal_flip=config.data.horizontal_flip,
        time_distribution=time_distribution(config),
        gate_noise=model.num_gates if fields.get("gate") == "noisy" else 0,
    )
    if processes.is_first:
        total, active = parameter_counts(model)
        print(
            f"{config.model_name}: {total:,} parameters, {active:,} active; {len(dataset):,} images; "
            f"{processes.world_size} processes on {processes.device.type}, ep_size {fields.get('ep_size', 1)}; "
            f"global batch {config.train.global_batch} = {batches.micro_batch} x {batches.accumulation} x "
            f"{processes.world_size}; steps {first_step} to {config.train.steps}",
            flush=True,
        )
        print(described(engine), flush=True)
        if dispatch:
            print(dispatch, flush=True)
    updates = Updates(engine)
    if config.faults.hang_timeout:
        wait_long()  # the watchdog knows better

    def settle() -> None:
        """All that waits for whether the last step was skipped; before the next, and before anything is written."""
        nonlocal skipped_in_a_row
        if (heard := updates.hear()) is None:
            return
        number, changed = heard
        if changed:
            objective.finish_step(add_over_processes)
            ema.update()
            skipped_in_a_row = 0
            return
        objective.skip_step()
        skipped_in_a_row += 1
        monitor.fault(number, "skipped", batches.images_of_step(number - 1).tolist(), told_at=number)
        say(f"step {number}: skipped, for a loss or gradient that is not finite")
        if skipped_in_a_row >= config.faults.max_skipped_steps:
            raise UserError(
                f"{skipped_in_a_row} steps in a row had a loss or gradient that is not finite, the last was "
                f"{number}; the images they saw are in {monitor.faults_path}. A lower train.lr, or "
                "train.max_grad_norm, may help; checkpoints hold sound weights"
            )

    def save(done: int) -> None:
        settle()
        extra = {
            "version": version,
            "images_seen": done * config.train.global_batch,
            "monitor": monitor.state(),
            "objective": objective.state(),
            "spikes": spikes.state(),
            "skipped_in_a_row": skipped_in_a_row,
            "config": config_to_dict(config),
        }
        checkpoints.save(done, about, extra)

    # Train.
    engine.train()
    compared = {config.faults.hash_every, config.monitor.checkpoint_every} if config.faults.hash_every else set()
    stream = batches.iterate(first_step, config.train.steps)
    bar = progress(
        range(first_step, config.train.steps), desc="train", total=config.train.steps, initial=first_step, unit="step"
    )
    for step in bar:
        done = step + 1
        last = done == config.train.steps
        lr = config.train.lr_at(step)
        set_optimizer(
            engine, lr=lr, betas=config.train.betas, eps=config.train.eps, weight_decay=config.train.weight_decay
        )
        objective.start_step(step)
        for micro_step in range(batches.accumulation):
            watchdog.reached("batch", done)
            batch = next(stream).to(processes.device)
            watchdog.reached("forward", done)
            losses = objective(engine, batch)
            watchdog.reached("backward", done)
            engine.backward(poisoned(losses.total))
            watchdog.reached("update", done)
            if micro_step + 1 == batches.accumulation:
                settle()
                if any(due(every, done, last) for every in compared):
                    compare_parameters(model, done)
            updates.step(done)
            monitor.add(done, losses.terms, losses.mse, losses.timestep)
        if config.loss.weighting == "uncertainty":  # what this step learns weighs the next one's losses
            settle()

        # Report and save.
        watchdog.reached("report", done)
        if done % log_every == 0 or last:
            settle()
            if processes.is_first:
                owner.check()
            for at, loss in monitor.log(done, config.train.steps, lr, grad_norm(engine)).items():
                if spikes(loss):
                    monitor.fault(at, "spike", batches.images_of_step(at - 1).tolist(), told_at=done, loss=loss)
                    say(f"step {at}: loss {loss:.4f} is a spike; what it saw is in {monitor.faults_path}")
        if due(config.monitor.routing_every, done, last) and objective.prior is not None:
            monitor.log_routing(done, objective.task_expert_map, objective.prior, objective.assignment)
        if due(config.monitor.routing_every, done, last) and objective.token_share is not None:
            monitor.log_token_share(done, objective.token_share)
        stop, lost = notices.exchange(stop_requested(), checkpoints.writer.problem is not None)
        if due(config.monitor.checkpoint_every, done, last) or stop:
            watchdog.reached("checkpoint", done)
            save(done)
        if stop and not last:
            checkpoints.finish()
            monitor.close()
            say(f"stopped by a signal after step {done}; all is saved, and --resume auto goes on from there")
            barrier()
            watchdog.stop()
            leave(EXIT_REQUEUE)
        if lost:
            checkpoints.finish()  # tells what happened
        if due(config.monitor.sample_every, done, last):
            watchdog.reached("sample", done)
            settle()
            averaged = ema.state_dict()
            if processes.is_first:
                tick = partial(watchdog.reached, "sample", done)
                picture = sample_grid(config, about["model"], averaged, objective.process, processes.device, tick)
                monitor.log_samples(done, picture)
    checkpoints.finish()
    monitor.close()
    if processes.is_first:
        print(f"trained {config.train.steps} steps; everything is in {run_dir}: checkpoints/ tensorboard/ log.jsonl")
    barrier()
    watchdog.stop()
    leave()


def due(every: int, step: int, last: bool) -> bool:
    return every > 0 and (step % every == 0 or last)


if __name__ == "__main__":
    run_and_end(main)
