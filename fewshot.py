"""Few-shot learning on a fraction of the data: prototypical networks (Snell et al., 2017, arXiv:1703.05175).

    python fewshot.py --fraction 0.01 --seed 1 2 3
    python fewshot.py --data synthetic --fraction 0.1 --episodes 300
    python fewshot.py --fraction 0.001 --query 2 --shot 5 --way 5
    python fewshot.py --fraction 0.01 --method labels        # beyond the slides: far more accurate

An episode draws `way` classes; of each, `shot` support images make a prototype, the mean of their embeddings,
and `query` other images, flipped and autoaugmented, are told apart by their distance to the prototypes. At the
end every image of the fraction is embedded, each class is split into sub-prototypes by k-means, and the whole test
split goes to the nearest.

`--method labels` trains a larger embedding to tell all classes apart at once, and then gives each class one prototype.
It sees the images and labels of the fraction, and nothing else.
"""

import torch
from tabulate import tabulate
from torch.nn import functional as F

import augment
import data
import models
import train

# Query images a class in an episode, for the fractions of the slides; other fractions take that of the next below
QUERIES = {0.001: 2, 0.002: 5, 0.005: 5, 0.01: 10, 0.02: 10, 0.05: 15, 0.1: 20}
BLOCK = 100  # episodes drawn and augmented at a time, a line of the history, and a checkpoint
VALIDATION_EPISODES = 600
SUB_PROTOTYPES = {"episodes": 3, "labels": 1}  # a class, at the end; one is what training on labels aims at
LABELLED_BATCH = 32  # images in a step of training on labels
SHARPNESS = 10.0  # logits are so many times a cosine: those of Chen et al. are learned, and end at about that
BATCH = 256  # images embedded at a time outside of episodes


# Episodes


def draw_episodes(labels, count, way, shot, query, generator):
    """Classes, int64 (count, way), and rows of images, int64 (count, way, shot + query), of `count` episodes; no
    image twice in one. labels: int64 (N,). Raises ValueError if a class has too few images. All on the CPU."""
    sizes = torch.bincount(labels)
    if len(sizes) < way:
        raise ValueError(f"--way {way}: there are {len(sizes)} classes")
    rows = torch.full((len(sizes), int(sizes.max())), -1)
    for label, size in enumerate(sizes.tolist()):
        rows[label, :size] = (labels == label).nonzero()[:, 0]
    classes = torch.rand(count, len(sizes), generator=generator).argsort(1)[:, :way]
    lots = torch.rand(count, way, rows.shape[1], generator=generator)
    lots = lots.masked_fill_(rows[classes] < 0, -1)  # a place without an image is drawn last
    return classes, rows[classes].gather(2, lots.topk(shot + query, dim=2).indices)


def check_sizes(labels, args, names):
    """Raise ValueError if a class cannot fill an episode; it says which fraction would do."""
    sizes = torch.bincount(labels, minlength=len(names))
    smallest = int(sizes.argmin())
    if sizes[smallest] < args.shot + args.query:
        fraction = enough(args)
        remedy = f"--fraction {fraction} would do, or " if fraction else ""
        raise ValueError(
            f"class {names[smallest]} has {sizes[smallest]} images, and an episode takes {args.shot} + {args.query}: "
            f"{remedy}lower --shot or --query"
        )


def enough(args):
    """The smallest fraction, in steps of 0.001, with images for an episode; None if even the whole split has not."""
    sizes = torch.bincount(data.load(args.data, args.root, 1.0, args.classes).train.labels)
    for fraction in (step / 1000 for step in range(1, 1001)):
        query = queries(fraction) if args.query == queries(args.fraction) else args.query
        if min(fraction * sizes.sum() / len(sizes), sizes.min()) >= args.shot + query:
            return fraction
    return None


def queries(fraction):
    """How many query images a class the slides have at a fraction."""
    return next((q for p, q in reversed(QUERIES.items()) if p <= fraction), QUERIES[0.001])


class Prototypes(torch.nn.Module):
    """An embedding and the nearest prototype, as one network over an episode.

    images: float (way * (shot + query), 3, H, W), the support images first, both sorted by class. Returns minus the
    squared distance of each query to each prototype, float (way * query, way).
    """

    def __init__(self, embedding, way, shot):
        super().__init__()
        self.embedding, self.way, self.shot = embedding, way, shot

    def forward(self, images):
        return episode_logits(self.embedding(images), self.way, self.shot)


def episode_logits(embeddings, way, shot):
    """As Prototypes, from embeddings, float (way * (shot + query), D)."""
    support, query = embeddings[: way * shot], embeddings[way * shot :]
    prototypes = support.view(way, shot, -1).mean(1)
    return -(query[:, None] - prototypes).square().sum(2)


def episodes(split, dataset, args, count, device, generator, streams):
    """Yield (images, labels) of each of `count` episodes: float (way * (shot + query), 3, H, W), support first; int64
    (way * query,), each query's place among the episode's classes. Queries go through the stream of augmentations,
    all episodes' at once."""
    _, rows = draw_episodes(split.labels.cpu(), count, args.way, args.shot, args.query, generator)
    where = split.images.device
    support = split.images[rows[:, :, : args.shot].flatten().to(where)].to(device)
    query = split.images[rows[:, :, args.shot :].flatten().to(where)].to(device)
    for augmentation in streams[0]:
        query = augmentation(query, generator)
    scale, shift = data.scale_and_shift(dataset.mean, dataset.std, device)
    labels = torch.arange(args.way, device=device).repeat_interleave(args.query)
    for parts in zip(support.chunk(count), query.chunk(count), strict=True):
        images = torch.cat(parts).contiguous(memory_format=torch.channels_last)
        yield images.float().mul_(scale).add_(shift), labels


# Labels


class Labelled(torch.nn.Module):
    """An embedding and a direction for each class: logits are cosines, so that the classes' means will do as prototypes.
    Chen et al., 2019, arXiv:1904.04232 (Baseline++).

    images: float (N, 3, H, W). Returns float (N, classes).
    """

    def __init__(self, embedding, width, classes):
        super().__init__()
        self.embedding, self.directions = embedding, torch.nn.Parameter(torch.randn(classes, width))

    def forward(self, images):
        return SHARPNESS * F.linear(self.embedding(images), F.normalize(self.directions, dim=1))


def labelled_batches(split, dataset, count, device, generator, streams):
    """Yield `count` batches of augmented (images, labels): every image of the split once, in random order, then again."""
    total, size = count * LABELLED_BATCH, len(split.labels)
    orders = [torch.randperm(size, generator=generator) for _ in range(-(-total // size))]
    rows = torch.cat(orders)[:total].to(split.images.device)
    images, labels = split.images[rows].to(device), split.labels[rows].to(device)
    for augmentation in streams[0]:
        images = augmentation(images, generator)
    scale, shift = data.scale_and_shift(dataset.mean, dataset.std, device)
    for part, true in zip(images.split(LABELLED_BATCH), labels.split(LABELLED_BATCH), strict=True):
        yield part.contiguous(memory_format=torch.channels_last).float().mul_(scale).add_(shift), true


# Test: sub-prototypes


def kmeans(points, clusters, generator, starts=10):
    """Centres, float (k, D), of k = min(clusters, N) clusters of points, float (N, D), and their inertia: the best of
    ten starts by k-means++ (Arthur and Vassilvitskii, 2007), each followed by Lloyd's steps to the end."""
    clusters, best = min(clusters, len(points)), (None, torch.inf)
    for _ in range(starts):
        centres = points[torch.randint(len(points), (1,), generator=generator).to(points.device)]
        while len(centres) < clusters:
            nearest = torch.cdist(points, centres).square().amin(1).cpu()
            chances = nearest if nearest.sum() > 0 else torch.ones(len(points))
            chosen = torch.multinomial(chances, 1, generator=generator).to(points.device)
            centres = torch.cat([centres, points[chosen]])
        before, members = None, torch.cdist(points, centres).argmin(1)
        while before is None or not torch.equal(members, before):
            belongs = F.one_hot(members, clusters).to(points.dtype)  # (N, k)
            sizes = belongs.sum(0)[:, None]
            centres = torch.where(sizes > 0, belongs.T @ points / sizes.clamp(min=1), centres)
            before, members = members, torch.cdist(points, centres).argmin(1)
        inertia = torch.cdist(points, centres).square().amin(1).sum().item()
        if inertia < best[1]:
            best = (centres, inertia)
    return best


@torch.no_grad()
def embed(model, split, dataset, device, autocast):
    """Embeddings of a whole split, float (N, 64), without augmentation."""
    model.eval()
    parts = []
    for images, _ in data.batches(split, BATCH, dataset.mean, dataset.std, device):
        with autocast:
            parts.append(model(images))
    return torch.cat(parts)


def classify(embeddings, labels, points, owners, num_classes):
    """Totals of giving every embedding to the class of the nearest point. points: float (P, D); owners: int64 (P,)."""
    totals = train.Totals(num_classes, embeddings.device)
    for part, true in zip(embeddings.split(BATCH), labels.split(BATCH), strict=True):
        distances = torch.cdist(part, points).square()
        logits = torch.full((len(part), num_classes), -torch.inf, device=part.device)
        logits.scatter_reduce_(1, owners.expand(len(part), -1), -distances, "amax")
        totals.count(logits, true, F.cross_entropy(logits, true))
    return totals


# A run


def train_embedding(args, seed, dataset, device, checkpoint):
    """Train on episodes or labels, then test. Returns weights and the run's part of a result file."""
    labelled = args.method == "labels"
    for split in (dataset.valid,) if labelled else (dataset.train, dataset.valid):
        check_sizes(split.labels.cpu(), args, dataset.classes)
    torch.manual_seed(seed)
    if labelled:
        model, classes, batch_size = models.ConvEmbedding(), len(dataset.classes), LABELLED_BATCH
        network = Labelled(model, 256, classes)
        streams = augment.parse("flip+translate+autoaugment")
    else:
        model, classes, batch_size = models.FewShotEmbedding(), args.way, args.way * (args.shot + args.query)
        network = Prototypes(model, args.way, args.shot)
        streams = augment.parse("flip+autoaugment")
    network = network.to(device, memory_format=torch.channels_last)
    print(f"embedding: {train.describe_model(model, args, device)}")
    blocks = [min(BLOCK, args.episodes - start) for start in range(0, args.episodes, BLOCK)]

    def train_batches(block):
        generator = torch.Generator().manual_seed(data.seed_from(seed, block, "episodes"))
        given = (blocks[block - 1], device, generator, streams)
        if labelled:
            return labelled_batches(dataset.train, dataset, *given)
        return episodes(dataset.train, dataset, args, *given)

    history = train.fit(
        *(network, args, seed, classes, device, checkpoint),
        counts=[count * batch_size for count in blocks],
        batch_size=batch_size,
        train_batches=train_batches,
        unit=f"{BLOCK} {'batches' if labelled else 'episodes'}",
    )

    autocast, _ = train.mixed_precision(args, device)
    num_classes = len(dataset.classes)
    labels = dataset.train.labels.to(device)
    points, tests = (embed(model, part, dataset, device, autocast) for part in (dataset.train, dataset.test))
    outcome = {"history": history, "episodes": validate(model, args, dataset, device, autocast)}
    generator = torch.Generator().manual_seed(data.seed_from(seed, "kmeans"))
    for name, clusters in (("test", SUB_PROTOTYPES[args.method]), ("one_prototype", 1)):
        centres = [kmeans(points[labels == label], clusters, generator)[0] for label in range(num_classes)]
        owners = torch.repeat_interleave(torch.tensor([len(c) for c in centres])).to(device)
        totals = classify(tests, dataset.test.labels.to(device), torch.cat(centres), owners, num_classes)
        outcome[name] = totals.metrics()
        if name == "test":
            outcome["confusion"] = totals.confusion.tolist()
    totals = classify(tests, dataset.test.labels.to(device), points, labels, num_classes)
    outcome["nearest_image"] = totals.metrics()
    show(outcome, SUB_PROTOTYPES[args.method])
    return model.state_dict(), outcome


def validate(model, args, dataset, device, autocast):
    """Mean accuracy over episodes of the valid split, without augmentation, with its 95 % confidence interval."""
    embeddings = embed(
        model, dataset.valid, dataset, device, autocast
    )  # once: they are the same in every episode
    generator = torch.Generator().manual_seed(data.seed_from("validation"))
    shape = (VALIDATION_EPISODES, args.way, args.shot, args.query)
    _, rows = draw_episodes(dataset.valid.labels.cpu(), *shape, generator)
    support, query = rows.to(device).split([args.shot, args.query], dim=2)
    truth = torch.arange(args.way, device=device).repeat_interleave(args.query)
    hits = []
    for of_support, of_query in zip(support, query, strict=True):
        parts = torch.cat([embeddings[of_support].flatten(0, 1), embeddings[of_query].flatten(0, 1)])
        hits.append((episode_logits(parts, args.way, args.shot).argmax(1) == truth).double().mean())
    hits = torch.stack(hits)
    interval = 1.96 * hits.std() / len(hits) ** 0.5
    return {"count": len(hits), "accuracy": hits.mean().item(), "confidence95": interval.item()}


def show(outcome, clusters):
    valid = outcome["episodes"]
    print(
        f"\n{valid['count']} validation episodes: accuracy {valid['accuracy']:.4f} ± {valid['confidence95']:.4f} (95 %)"
    )
    rows = [
        [name, *(f"{outcome[key][m]:.4f}" for m in train.METRICS)]
        for name, key in (
            *([(f"{clusters} sub-prototypes a class", "test")] if clusters > 1 else []),
            ("1 prototype a class", "one_prototype"),
            ("nearest training image", "nearest_image"),
        )
    ]
    print(tabulate(rows, ["test split", *train.METRICS], disable_numparse=True))


default_query = queries


def make_parser():
    parser = data.new_parser(__doc__)
    group = parser.add_argument_group("episodes")
    count = train.number(int, 0)
    group.add_argument("--way", type=train.number(int, 1), default=5, help="classes (default: %(default)s)")
    group.add_argument("--shot", type=count, default=5, help="support images a class (default: %(default)s)")
    group.add_argument("--query", type=count, help="query images a class (default: the slides', by fraction: "
                       f"{', '.join(f'{q} at {p}' for p, q in QUERIES.items())})")  # fmt: skip
    group.add_argument(
        "--episodes", type=count, default=3000, help="or batches of labels (default: %(default)s)"
    )
    group.add_argument("--method", default="episodes", choices=SUB_PROTOTYPES, help="labels: train on all classes' labels, by "
                       "default with --schedule onecycle (default: %(default)s)")  # fmt: skip
    train.add_optimizer_arguments(parser)
    train.add_run_arguments(parser)
    parser.set_defaults(fraction=0.01, schedule="none")
    return parser


def parse_arguments(argv=None):
    """The settings of a command line, and the name of its run."""
    parser = make_parser()
    args = parser.parse_args(argv)
    train.check_optimizer(args)
    args.query = args.query or queries(args.fraction)
    schedule = "onecycle" if args.method == "labels" else "none"
    args.schedule = args.schedule or schedule
    recipe = {"fraction": args.fraction, "query": queries(args.fraction), "schedule": schedule}
    name = train.run_name(
        args, ("fewshot", f"p{args.fraction!r}"), lambda key: recipe.get(key, parser.get_default(key))
    )
    return args, name


def main():
    train.run_seeds(*parse_arguments(), train_embedding)


if __name__ == "__main__":
    data.command_line(main)
