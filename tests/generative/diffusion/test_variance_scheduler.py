"""The scheduler against our sampler, diffusers' schedulers and a real pipeline."""

import copy
import pickle

import pytest
import torch

from generative.diffusion.mixtures import double, mixture
from kexue.generative.diffusion import (
    AnalyticVarianceScheduler,
    ClassifierFreeGuidance,
    DiscreteSchedule,
    NetworkDenoiser,
    PointDataVariance,
    SchedulerOutput,
    SquaredNoiseVariance,
    StandardNormalDataVariance,
    TabulatedVariance,
    estimate_clean_variance,
    optimal_times,
    sample,
)

LINEAR = DiscreteSchedule.linear()
SHAPE = (3, 2)


def source(seed=0):
    return torch.Generator().manual_seed(seed)


def table():
    times = torch.arange(1, 1001, dtype=torch.float64)
    return TabulatedVariance(times, 1 / (4 + 1 / LINEAR.sigma(times) ** 2), schedule=LINEAR)


def network(x, time):
    return 0.9 * x + 0.1 * torch.sin(3 * x + time.reshape(-1, 1) / 300)


def walk(scheduler, initial, generator, **options):
    x = initial
    for timestep in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, timestep), timestep.to(x))
        x = scheduler.step(output, timestep, x, generator=generator, **options)[0]
    return x


VARIANCES = {"none": None, "standard normal": StandardNormalDataVariance(), "table": table()}


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction", "score"])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_steps_are_those_of_the_sampler_on_the_same_draws(eta, variance, prediction_type):
    scheduler = AnalyticVarianceScheduler(
        LINEAR, VARIANCES[variance], eta=eta, prediction_type=prediction_type, noise_limit=0.01
    )
    scheduler.set_timesteps(7)
    initial = torch.randn(SHAPE, generator=source(1))
    denoiser = NetworkDenoiser(network, LINEAR, time_offset=-1, prediction_type=prediction_type)
    expected = sample(
        denoiser, initial=initial, num_steps=7, eta=eta, clean_variance=VARIANCES[variance],
        noise_limit=0.01, generator=source(),
    )  # fmt: skip
    # A single variance is rounded once here and once more there: an ulp a step.
    torch.testing.assert_close(walk(scheduler, initial, source()), expected, rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace", "quadratic"])
def test_timesteps_are_the_times_of_the_schedule_less_one(spacing):
    scheduler = AnalyticVarianceScheduler(LINEAR, timestep_spacing=spacing)
    scheduler.set_timesteps(13)
    expected = LINEAR.times(13, spacing=spacing)[:-1] - 1
    assert scheduler.timesteps.tolist() == expected.tolist()
    assert scheduler.timesteps.dtype == torch.int64
    assert scheduler.num_inference_steps == 13
    assert scheduler.init_noise_sigma == 1.0
    assert scheduler.order == 1


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_grids_are_those_of_diffusers(spacing):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(timestep_spacing=spacing)
    theirs.set_timesteps(20)
    ours = AnalyticVarianceScheduler(LINEAR, timestep_spacing=spacing)
    ours.set_timesteps(20)
    assert torch.equal(ours.timesteps, theirs.timesteps)


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_small_variance_is_the_ddpm_of_diffusers(spacing):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(
        timestep_spacing=spacing, clip_sample=True, variance_type="fixed_small"
    )
    ours = AnalyticVarianceScheduler(LINEAR, timestep_spacing=spacing, clip_sample=(-1.0, 1.0))
    initial = torch.randn(8, 3, generator=source(1))
    states = []
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(20)
        states.append(walk(scheduler, initial, source()))
    # Their cumprod rounds up to a thousand times in float32: √1000 · 6e-8, and five times that.
    assert ((states[0] - states[1]).abs().max() / states[1].abs().max()).item() < 1e-5


def test_large_variance_is_the_ddpm_of_diffusers_but_for_the_last_step():
    """With trailing spacing theirs adds noise to the final image; the states before agree."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(
        timestep_spacing="trailing", clip_sample=False, variance_type="fixed_large"
    )
    ours = AnalyticVarianceScheduler(LINEAR, StandardNormalDataVariance())
    x = torch.randn(8, 3, generator=source(1))
    y, one, two = x, source(), source()
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
    for timestep in ours.timesteps[:-1]:
        x = ours.step(network(x, timestep.float()), timestep, x, generator=one).prev_sample
        y = theirs.step(network(y, timestep.float()), timestep, y, generator=two).prev_sample
    assert ((x - y).abs().max() / y.abs().max()).item() < 2e-5
    last = ours.timesteps[-1]
    final = ours.step(network(x, last.float()), last, x, generator=one)
    noisy = theirs.step(network(y, last.float()), last, y, generator=two)
    assert torch.equal(final.prev_sample, final.pred_original_sample)
    assert (noisy.prev_sample - noisy.pred_original_sample).abs().max() > 0.1


def test_optimal_times_become_timesteps():
    denoiser = mixture(LINEAR)
    candidates = double([1, 20, 100, 250, 500, 750, 1000])
    data = denoiser.sample(200, generator=source())
    estimated = estimate_clean_variance(denoiser, data, times=candidates, generator=source(1))
    times = optimal_times(estimated, 4, grid=candidates).times
    scheduler = AnalyticVarianceScheduler(LINEAR, estimated, prediction_type="sample")
    scheduler.set_timesteps(timesteps=times[:-1] - 1)
    initial = torch.randn(SHAPE, dtype=torch.float64, generator=source(2))
    x, generator = initial, source(3)
    for timestep in scheduler.timesteps:
        output = denoiser.predict(x, timestep + 1.0).sample
        x = scheduler.step(output, timestep, x, generator=generator).prev_sample
    expected = sample(
        denoiser, initial=initial, times=times, clean_variance=estimated, generator=source(3)
    )
    torch.testing.assert_close(x, expected, rtol=1e-10, atol=1e-12)


def test_the_previous_timestep_is_looked_up_in_an_irregular_list():
    scheduler = AnalyticVarianceScheduler(LINEAR, eta=0.0)
    scheduler.set_timesteps(timesteps=[999, 998, 3])
    x = torch.randn(SHAPE, generator=source())
    output = network(x, torch.tensor(998.0))
    step = scheduler.step(output, 998, x)
    denoiser = NetworkDenoiser(lambda x, time: output, LINEAR)
    expected = sample(denoiser, initial=x, times=double([999, 4]), eta=0.0)
    torch.testing.assert_close(step.prev_sample, expected, rtol=1e-6, atol=1e-6)


def test_clipping_moves_the_mean_but_not_what_the_variance_sees():
    seen = []

    def variance(x, time, prediction, condition=None):
        seen.append(prediction)
        return torch.zeros(())

    x = torch.full(SHAPE, 5.0)
    scheduler = AnalyticVarianceScheduler(
        LINEAR, variance, prediction_type="sample", clip_sample=(-1.0, 1.0), eta=0.0
    )
    scheduler.set_timesteps(4)
    step = scheduler.step(torch.full(SHAPE, 3.0), 999, x)
    assert bool((step.pred_original_sample == 1).all())
    assert bool((seen[0].sample == 3).all())


@pytest.mark.parametrize("head", ["network", "guidance"])
def test_clamping_leaves_the_squared_noise_variance_of_sampler_and_scheduler_alike(head):
    """x̂_0 leaves [−1, 1] by far, so that the noise of the clamped one is another."""
    variance = SquaredNoiseVariance(lambda x, time, *label: 1 + x**2, schedule=LINEAR)
    clip = (-1.0, 1.0)
    if head == "network":
        denoiser = NetworkDenoiser(network, LINEAR, time_offset=-1, clip_sample=clip)
    else:
        inner = NetworkDenoiser(lambda x, time, y: network(x, time), LINEAR, time_offset=-1)
        denoiser = ClassifierFreeGuidance(inner, scale=1.5, null_condition=0, clip_sample=clip)
    scheduler = AnalyticVarianceScheduler(LINEAR, variance, clip_sample=clip)
    scheduler.set_timesteps(7)
    initial = torch.randn(SHAPE, generator=source(1))
    expected = sample(
        denoiser, initial=initial, num_steps=7, clean_variance=variance, generator=source(),
        condition=None if head == "network" else torch.tensor(1),
    )  # fmt: skip
    torch.testing.assert_close(walk(scheduler, initial, source()), expected, rtol=5e-6, atol=5e-6)


def test_the_final_step_is_clean_and_draws_nothing():
    scheduler = AnalyticVarianceScheduler(LINEAR, table())
    scheduler.set_timesteps(3)
    used, fresh = source(4), source(4)
    x = torch.randn(SHAPE, generator=source())
    step = scheduler.step(0.1 * x, scheduler.timesteps[-1], x, generator=used)
    assert torch.equal(step.prev_sample, step.pred_original_sample)
    assert torch.equal(used.get_state(), fresh.get_state())


@pytest.mark.parametrize("shape", [SHAPE, (1, 1)])
def test_nothing_is_drawn_for_a_variance_that_is_known_to_be_zero(shape):
    scheduler = AnalyticVarianceScheduler(LINEAR, PointDataVariance(), eta=0.0)
    scheduler.set_timesteps(3)
    used, fresh = source(4), source(4)
    x = torch.randn(shape, generator=source())
    scheduler.step(0.1 * x, 999, x, generator=used)
    scheduler.clean_variance = lambda x, time, prediction, condition=None: torch.zeros(1, 1)
    scheduler.step(0.1 * x, 999, x, generator=used)
    assert torch.equal(used.get_state(), fresh.get_state())


def test_a_plain_tuple_is_returned_on_request():
    scheduler = AnalyticVarianceScheduler(LINEAR)
    scheduler.set_timesteps(2)
    x = torch.zeros(SHAPE)
    named = scheduler.step(x, 999, x, generator=source())
    plain = scheduler.step(x, 999, x, generator=source(), return_dict=False)
    assert isinstance(named, SchedulerOutput)
    assert type(plain) is tuple
    assert all(torch.equal(a, b) for a, b in zip(named, plain, strict=True))


def test_noise_is_added_at_timesteps_that_count_from_zero():
    diffusers = pytest.importorskip("diffusers")
    clean, noise = torch.randn(2, 3, 2, generator=source())
    timesteps = torch.tensor([0, 500, 999])
    theirs = diffusers.DDPMScheduler().add_noise(clean, noise, timesteps)
    ours = AnalyticVarianceScheduler(LINEAR).add_noise(clean, noise, timesteps)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_one_timestep_in_a_list_is_for_all_examples():
    clean, noise = torch.randn(2, 4, 2, generator=source())
    scheduler = AnalyticVarianceScheduler(LINEAR)
    expected = scheduler.add_noise(clean, noise, torch.tensor([5] * 4))
    for timesteps in (torch.tensor([5]), torch.tensor(5)):
        torch.testing.assert_close(scheduler.add_noise(clean, noise, timesteps), expected)


@pytest.mark.parametrize("kind", ["number", "per entry"])
def test_a_generator_for_each_example_gives_it_the_noise_it_has_alone(kind):
    clean_variance = {"number": table(), "per entry": lambda x, *_: torch.full_like(x, 0.3)}[kind]
    scheduler = AnalyticVarianceScheduler(LINEAR, clean_variance)
    scheduler.set_timesteps(3)
    x = torch.randn(SHAPE, generator=source(1))
    together = scheduler.step(0.1 * x, 999, x, generator=[source(i) for i in range(3)])
    alone = [
        scheduler.step(0.1 * row, 999, row, generator=source(i)).prev_sample
        for i, row in enumerate(x.split(1))
    ]
    torch.testing.assert_close(together.prev_sample, torch.cat(alone), rtol=1e-6, atol=1e-6)


def test_schedulers_can_be_copied_and_pickled():
    scheduler = AnalyticVarianceScheduler(LINEAR, table())
    scheduler.set_timesteps(5)
    initial = torch.randn(SHAPE, generator=source(1))
    expected = walk(scheduler, initial, source())
    for other in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert torch.equal(walk(other, initial, source()), expected)
    assert len(scheduler) == 1000


@pytest.fixture
def pipeline():
    """A pipeline of diffusers around a small U-Net, with our scheduler in it."""
    diffusers = pytest.importorskip("diffusers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = diffusers.UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, layers_per_block=1,
            block_out_channels=(8, 16), norm_num_groups=4,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
        ).eval()  # fmt: skip
    data = torch.rand(20, 1, 8, 8, generator=source()) * 2 - 1
    times = LINEAR.times(6)
    denoiser = NetworkDenoiser(unet, LINEAR, time_offset=-1)
    estimated = estimate_clean_variance(
        denoiser, data, times=times[:-1], data_range=(-1, 1), generator=source(1)
    )
    scheduler = AnalyticVarianceScheduler(LINEAR, estimated)
    made = diffusers.DDPMPipeline(unet=unet, scheduler=scheduler)
    made.set_progress_bar_config(disable=True)
    return made, denoiser, estimated


def run(pipeline, seed):
    return pipeline(
        batch_size=3, generator=source(seed), num_inference_steps=6, output_type="np"
    ).images


def test_a_diffusers_pipeline_runs_with_it_and_is_seeded(pipeline):
    made, *_ = pipeline
    images = run(made, 0)
    assert images.shape == (3, 8, 8, 1)
    assert bool((images == run(made, 0)).all())
    assert bool((images != run(made, 1)).any())


def test_a_diffusers_pipeline_draws_what_our_sampler_draws(pipeline):
    made, denoiser, estimated = pipeline
    ours = sample(
        denoiser, (3, 1, 8, 8), num_steps=6, clean_variance=estimated, generator=source(7)
    )
    expected = (ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    # The U-Net sees an integer timestep there and the same number as a float here.
    torch.testing.assert_close(torch.from_numpy(run(made, 7)), expected, rtol=1e-5, atol=1e-5)


def test_a_diffusers_pipeline_takes_a_generator_for_each_image(pipeline):
    made, *_ = pipeline
    options = {"num_inference_steps": 6, "output_type": "np"}
    together = made(batch_size=2, generator=[source(3), source(4)], **options).images
    alone = [made(batch_size=1, generator=source(seed), **options).images[0] for seed in (3, 4)]
    # Convolutions over one image and over two may add in another order, six times.
    assert abs(together - alone).max() < 1e-4


def test_a_text_pipeline_takes_the_scheduler_after_it_is_made():
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
        cross_attention_dim=8, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
    )  # fmt: skip
    made = diffusers.StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=unet,
        scheduler=diffusers.DDPMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    made.scheduler = AnalyticVarianceScheduler(DiscreteSchedule.scaled_linear(), table())
    embeddings = torch.zeros(2, 5, 8)
    latents = made(
        prompt_embeds=embeddings, negative_prompt_embeds=embeddings, num_inference_steps=2,
        output_type="latent", generator=[source(0), source(1)], height=64, width=64,
    ).images  # fmt: skip
    assert latents.shape == (2, 4, 8, 8)
    assert made.scheduler.timesteps.tolist() == [999, 499]


def test_pipelines_that_build_their_own_scheduler_do_not_take_ours(pipeline):
    """DDIMPipeline would make one from a config, and run without the variance."""
    diffusers = pytest.importorskip("diffusers")
    made, *_ = pipeline
    with pytest.raises(AttributeError, match="config"):
        diffusers.DDIMPipeline(unet=made.unet, scheduler=made.scheduler)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prediction_type": "noise"}, "prediction_type.*noise"),
        ({"eta": 1.5}, "eta.*1.5"),
        ({"clip_sample": (1, -1)}, "clip_sample.*1, -1"),
        ({"noise_limit": -1.0}, "noise_limit.*-1"),
        ({"timestep_spacing": "karras"}, "timestep_spacing.*karras"),
    ],
)
def test_bad_options_are_refused_by_name_and_value(options, words):
    with pytest.raises(ValueError, match=words):
        AnalyticVarianceScheduler(LINEAR, **options)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "exactly one.*neither"),
        ({"num_inference_steps": 3, "timesteps": [5]}, "exactly one.*both"),
        ({"num_inference_steps": 0}, "num_steps.*0"),
        ({"timesteps": [5, 7]}, "timesteps.*5, 7"),
        ({"timesteps": [1000, 7]}, "timesteps.*1000"),
        ({"timesteps": [7, -1]}, "timesteps.*-1"),
        ({"timesteps": [7.5, 1]}, "timesteps.*7.5"),
        ({"timesteps": []}, "timesteps"),
    ],
)
def test_bad_grids_are_refused_by_name_and_value(options, words):
    with pytest.raises(ValueError, match=words):
        AnalyticVarianceScheduler(LINEAR).set_timesteps(**options)


@pytest.mark.bad_input
def test_bad_steps_are_refused():
    scheduler = AnalyticVarianceScheduler(LINEAR)
    x = torch.zeros(SHAPE)
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.step(x, 999, x)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match=r"timestep.*750"):
        scheduler.step(x, 750, x)
    for wrong in (999.7, torch.tensor(249.5)):
        with pytest.raises(ValueError, match=r"timestep must be one of.*\.[75]"):
            scheduler.step(x, wrong, x)
    with pytest.raises(ValueError, match=r"generator.*3 examples.*2"):
        scheduler.step(x, 999, x, generator=[source(), source()])
    for wrong in (-1, 1000):
        with pytest.raises(ValueError, match=rf"timesteps must lie in 0…999, got \[3, {wrong}"):
            scheduler.add_noise(x, x, torch.tensor([3, wrong, 5]))
    with pytest.raises(ValueError, match=r"model_output.*shape"):
        scheduler.step(torch.zeros(3, 4), 999, x)
    from kexue.generative.diffusion import HeatSchedule

    with pytest.raises(ValueError, match=r"DiscreteSchedule.*HeatSchedule"):
        AnalyticVarianceScheduler(HeatSchedule())
