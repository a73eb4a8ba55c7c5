"""The vector quantizer: against plain arithmetic, and the same codebook on one rank as on two."""

import multiprocessing
import os

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from nar_t2i.tokenizers import VectorQuantizer, quantizers


def quantizer(codes=8, width=4, **kwargs):
    torch.manual_seed(0)
    return VectorQuantizer(codes, width, **kwargs)


def latents(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_codes_are_the_nearest_of_the_normalised_codebook():
    q = quantizer(update="loss")
    with torch.no_grad():
        q.codebook.mul_(torch.rand(8, 1) * 5)  # lengths must not matter
    z = 3 * latents(2, 5, 4)
    out = q(z)
    unit, book = F.normalize(z, dim=-1), F.normalize(q.codebook, dim=-1)
    distance = (unit[..., None, :] - book).square().sum(-1)
    assert torch.equal(out.codes, distance.argmin(-1))
    torch.testing.assert_close(out.error, distance.min(-1).values, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(out.latents, q.lookup(out.codes))
    assert out.latents.shape == z.shape and out.codes.dtype == torch.int64 and out.error.shape == (2, 5)


def test_the_lookup_stays_in_fp32_under_autocast():
    q = VectorQuantizer(4096, 8)
    z = latents(500, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = q(z)
    assert torch.equal(out.codes, q(z).codes) and out.error.dtype == torch.float32
    # Control: in bf16 many a neighbour is another one.
    rounded = (F.normalize(z, dim=-1).bfloat16() @ F.normalize(q.codebook, dim=-1).bfloat16().T).argmax(1)
    assert (rounded != out.codes).float().mean() > 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_codec_of_another_type_works(dtype):
    q = quantizer().to(dtype)
    out = q(latents(3, 4).to(dtype))
    assert q.lookup(out.codes).dtype == dtype
    q.step()
    assert q.codebook.dtype == dtype


def test_gradients():
    """Straight-through to the latents, commitment, and the codebook's own loss."""
    z = latents(6, 4).requires_grad_()
    weight = latents(6, 4, seed=2)
    for update in ("ema", "loss"):
        q = quantizer(update=update, commitment=0.3)
        out = q(z)
        (through,) = torch.autograd.grad((out.latents * weight).sum(), z, retain_graph=True)
        (expected,) = torch.autograd.grad((F.normalize(z, dim=-1) * weight).sum(), z)
        torch.testing.assert_close(through, expected)
        chosen = q.lookup(out.codes).detach()
        commitment = 0.3 * (F.normalize(z, dim=-1) - chosen).square().sum(-1).mean()
        (expected,) = torch.autograd.grad(commitment, z)
        (got,) = torch.autograd.grad(out.loss, z, retain_graph=True)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(out.loss, commitment * (1 if update == "ema" else 1 + 1 / 0.3))
    # Only codes that were used are pulled, towards the latents that used them.
    (pull,) = torch.autograd.grad(out.loss, q.codebook)
    assert torch.equal(pull.abs().sum(1) > 0, torch.bincount(out.codes, minlength=8) > 0)
    own = (F.normalize(z, dim=-1).detach() - q.lookup(out.codes)).square().sum(-1).mean()
    (expected,) = torch.autograd.grad(own, q.codebook)
    torch.testing.assert_close(pull, expected)  # the commitment pulls latents alone
    before = out.error.mean()
    with torch.no_grad():
        q.codebook -= 0.05 * pull
    assert q(z).error.mean() < before


def test_moving_averages_by_hand():
    q = quantizer(decay=0.9, revive_below=0)
    book, z = q.codebook.clone(), latents(20, 4)
    codes = q(z).codes
    used = q.step()
    unit = F.normalize(z, dim=-1)
    for k in range(8):
        mine = unit[codes == k]
        assert used[k] == len(mine)
        assert q.counts[k] == pytest.approx(0.9 + 0.1 * len(mine))
        torch.testing.assert_close(q.sums[k], 0.9 * book[k] + 0.1 * mine.sum(0))
        torch.testing.assert_close(q.codebook[k], F.normalize(q.sums[k], dim=0))


def test_the_loss_update_leaves_the_codebook_to_the_optimizer():
    q = quantizer(update="loss", revive_below=0)
    before = q.codebook.detach().clone()
    q(latents(20, 4))
    q.step()
    assert torch.equal(q.codebook, before) and q.codebook.requires_grad and q.codebook.no_decay


@pytest.mark.parametrize("update", ["ema", "loss"])
def test_dead_codes_take_the_place_of_latents(update):
    q = quantizer(64, update=update, decay=0.5)
    z = latents(40, 4)
    for _ in range(8):
        q(z)
        q.step()
        rows = F.normalize(z, dim=-1)
        dead = q.counts == q.counts.max()
    distance = torch.cdist(F.normalize(q.codebook.detach(), dim=1), rows).min(1).values
    # All latents are one batch, so whatever was revived last lies on one of them.
    assert (distance < 1e-5).sum() >= 20
    assert dead.any() and q.updates == 8
    used = torch.bincount(q(z).codes, minlength=64) > 0
    assert used.sum() > 30, "revived codes are not used"


@pytest.mark.parametrize("update", ["ema", "loss"])
def test_a_revived_code_counts_as_the_mean(update):
    q = quantizer(8, update=update, decay=0.5, revive_below=0.5)
    q(q.codebook.detach()[:1].repeat(12, 1))  # all of one code: 0.5 · 1 + 0.5 · 12, and 0.5 of the seven others
    q.step()
    assert q.counts.tolist() == pytest.approx([6.5] + [(6.5 + 7 * 0.5) / 8] * 7)
    if update == "ema":
        torch.testing.assert_close(q.sums[1:], q.codebook[1:] * q.counts[1:, None])


def test_revival_can_be_switched_off():
    q, off = quantizer(64, decay=0.5), quantizer(64, decay=0.5, revive_below=0)
    for module in (q, off):
        for _ in range(8):
            module(latents(40, 4))
            module.step()
    assert off.counts.min() < 0.01 < q.counts.min()


def test_revival_ends_after_so_many_updates():
    q, on = quantizer(64, decay=0.5, revive_steps=3), quantizer(64, decay=0.5)
    for step in range(12):
        for module in (q, on):
            module(latents(40, 4))
            module.step()
        if step == 2:
            assert all(torch.equal(value, on.state_dict()[name]) for name, value in q.state_dict().items())
    assert q.counts.min() < 0.01 < on.counts.min()


def test_more_dead_codes_than_latents():
    q = quantizer(64, decay=0.01)
    for _ in range(3):
        q(latents(3, 4))
        q.step()
    assert q.codebook.isfinite().all() and q.codebook.norm(dim=1).allclose(torch.ones(64))


def test_a_step_after_nothing_changes_nothing():
    q = quantizer()
    before = {k: v.clone() for k, v in q.state_dict().items()}
    assert q.step().tolist() == [0.0] * 8
    assert all(torch.equal(v, before[k]) for k, v in q.state_dict().items())


def test_evaluation_and_passes_without_gradients_are_not_counted():
    q = quantizer()
    with torch.no_grad():
        q(latents(5, 4))
    q.eval()(latents(5, 4))
    assert not q._seen
    q.train()(latents(5, 4))
    assert len(q._seen) == 1 and not q._seen[0][0].requires_grad
    q.step()
    assert not q._seen, "latents of finished steps are kept"


@pytest.mark.parametrize("update", ["ema", "loss"])
def test_the_codebook_and_its_statistics_are_in_the_checkpoint(update):
    q, other = (VectorQuantizer(8, 4, update, decay=0.5, revive_below=0.8) for _ in range(2))
    for step in range(3):
        q(latents(20, 4, seed=step))
        q.step()
    other.load_state_dict(q.state_dict())
    for module in (q, other):
        module(latents(20, 4, seed=9))
        module.step()
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in q.state_dict().items())


STEPS, PASSES, ROWS = 12, 2, 8


def train(rank, world, update, passes, reduced=True, revive_below=0.3):
    """The codebook after some steps of `PASSES` × `ROWS` latents, dealt out as GlobalBatchSampler deals samples."""
    gather = quantizers._gather
    if not reduced:
        quantizers._gather = lambda x: x
    try:
        q = quantizer(32, update=update, decay=0.7, revive_below=revive_below)
        encoder = torch.nn.Linear(4, 4, bias=False)
        parameters = [*encoder.parameters(), *q.parameters()]
        optimizer = torch.optim.SGD(parameters, lr=0.5)
        rows = PASSES * ROWS // passes // world
        for step in range(STEPS):
            batch = latents(PASSES * ROWS, 4, seed=step).split(rows)
            for start in range(passes):
                out = q(encoder(batch[start * world + rank]))
                ((out.loss + out.latents.sum(-1).square().mean()) / passes).backward()
            for p in parameters if world > 1 else ():
                dist.all_reduce(p.grad)  # as DDP does
                p.grad /= world
            optimizer.step()
            optimizer.zero_grad()
            q.step()
        return {k: v.detach().clone() for k, v in q.state_dict().items()}
    finally:
        quantizers._gather = gather


def rank_main(rank, port, jobs, queue):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    results = [{k: v.numpy() for k, v in train(rank, 2, *job).items()} for job in jobs]
    queue.put((rank, results))
    dist.barrier()
    dist.destroy_process_group()


JOBS = [(update, passes, reduced) for update in ("ema", "loss") for passes in (1, 2) for reduced in (True, False)]


@pytest.fixture(scope="module")
def two_ranks():
    """What two processes made of each job."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    port = 29500 + os.getpid() % 2000
    processes = [context.Process(target=rank_main, args=(rank, port, JOBS, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    results = dict(queue.get(timeout=180) for _ in processes)
    for process in processes:
        process.join(60)
    return {job: [results[rank][i] for rank in range(2)] for i, job in enumerate(JOBS)}


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("update", ["ema", "loss"])
def test_one_rank_and_two_ranks_make_the_same_codebook(two_ranks, update, passes):
    alone = train(0, 1, update, 1)
    assert alone["updates"] == STEPS
    without = train(0, 1, update, 1, revive_below=0.0)
    assert (alone["codebook"] - without["codebook"]).abs().max() > 0.1, "too few codes were revived to tell"
    first, second = two_ranks[update, passes, True]
    for name, value in alone.items():
        torch.testing.assert_close(torch.from_numpy(first[name]), value, rtol=1e-4, atol=1e-5)
        assert (first[name] == second[name]).all(), "ranks differ"
    # Accumulation on one rank makes the same one, too.
    for name, value in train(0, 1, update, 2).items():
        torch.testing.assert_close(value, alone[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("update", ["ema", "loss"])
def test_control_without_the_reduction_the_codebooks_differ(two_ranks, update):
    alone = train(0, 1, update, 1)
    first, second = two_ranks[update, 1, False]
    assert abs(first["codebook"] - second["codebook"]).max() > 0.1
    assert abs(first["codebook"] - alone["codebook"].numpy()).max() > 0.1
