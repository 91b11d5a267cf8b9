"""What was reported of other repositories of this kind, tried on this one. What failed here has its test where the cure is."""

EAGER = "import functools, torch; torch.compile = functools.partial(torch.compile, backend='eager')"


def test_a_compiled_run_saves_the_names_of_the_plain_network(run):
    """karpathy/nanoGPT issue 325: with torch.compile every name began with _orig_mod, and nothing loaded again."""
    run.train(EAGER, COMPILE=True, max_steps=3)
    state = run.state()
    assert state["model"].keys() == state["ema"].keys()
    assert not [name for name in state["model"] if "_orig_mod" in name or "module." in name]
    run.train(COMPILE=False, max_steps=6)
    run.train(EAGER, COMPILE=True, max_steps=9)
    run.sample("--checkpoint", "checkpoints/best.pth", "--num_samples", 2, "--steps", 2)


def test_a_size_that_is_no_power_of_two_trains_and_draws(run):
    """crowsonkb/v-diffusion-pytorch issue 3: the skip connections did not fit."""
    run.train(EPOCHS=1, IMAGE_SIZE=20, DIM_MULTS=(1, 2, 2), ATTENTION_RESOLUTIONS=(10, 5))
    run.sample("--checkpoint", "checkpoints/best.pth", "--num_samples", 3, "--batch_size", 2, "--steps", 2)
    assert len(run.files("images/*.png")) == 3
