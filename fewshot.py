"""Few-shot learning on a fraction of the data: prototypical networks (Snell et al., 2017, arXiv:1703.05175).

    python fewshot.py --fraction 0.01 --seed 1 2 3
    python fewshot.py --data synthetic --fraction 0.1 --episodes 300

An episode draws `way` classes. The prototype of each is the mean embedding of `shot` support images; `query`
other images, augmented with flip and autoaugment, are classified by their distance to the prototypes. For the
test, all images of the fraction are embedded, k-means finds three prototypes per class, and every test image
gets the class of the nearest. Beyond the study, train.py with a schedule is more accurate on the same images:

    python train.py --fraction 0.01 --aug flip+translate+autoaugment --schedule onecycle \\
        --batch-size 32 --steps-per-epoch 300
"""

import torch
from tabulate import tabulate
from torch.nn import functional as F

import augment
import data
import models
import runs
import train

# Query images per class in an episode, for the study's fractions; others use that of the next smaller one
QUERIES = {0.001: 2, 0.002: 5, 0.005: 5, 0.01: 10, 0.02: 10, 0.05: 15, 0.1: 20}
EPOCH = 100  # episodes drawn and augmented together: one epoch in the history
VALIDATION_EPISODES = 600
PROTOTYPES = 3  # per class, for the test
KMEANS_STEPS = 300  # at most, per start
BATCH = 256  # embeddings classified at a time


def recipe(fraction):
    """The study's way, shot and query for a fraction of the training images."""
    query = next((q for p, q in reversed(QUERIES.items()) if p <= fraction), QUERIES[0.001])
    return {"way": 5, "shot": 5, "query": query}


def load(args, device):
    """The data set. Sets way, shot and query in args where they are None: to the recipe's or, with few
    classes, fewer ways and, with few images, fewer queries, down to two, then fewer shots, then one query.
    Raises ValueError if there are too few classes or images."""
    dataset = train.load(args, device)
    splits, number = ("train", "valid"), len(dataset.classes)
    sizes = torch.stack([torch.bincount(getattr(dataset, name).labels.cpu()) for name in splits])
    fewest = int(sizes.min())
    wanted = {name: getattr(args, name) or size for name, size in recipe(args.fraction).items()}
    way = args.way or max(2, min(wanted["way"], number))
    left = max(fewest - wanted["shot"], 1 if args.shot or fewest < 3 else 2)  # for queries
    query = args.query or min(wanted["query"], left)
    shot = args.shot or max(1, min(wanted["shot"], fewest - query))
    options = f"--way {way} --shot {shot} --query {query}"
    smallest = zip(splits, sizes.amin(dim=1), sizes.argmin(dim=1), strict=True)
    smallest = [f"{n} images in {name} ({dataset.classes[label]})" for name, n, label in smallest]
    found = f"{number} classes, the smallest with {' and '.join(smallest)}"
    if way > number or shot + query > fewest:
        raise ValueError(f"{found}: too few for {options}: ask for less, or raise --fraction")
    if [way, shot, query] != list(wanted.values()):
        print(f"{found}: episodes use {options}")
    args.way, args.shot, args.query = way, shot, query
    return dataset


def episode_rows(labels, count, way, shot, query, generator):
    """Rows of the support images, int64 (count, way * shot), and query images, int64 (count, way * query), of
    `count` episodes, by class. No image or class recurs in an episode. labels: int64 (N,), on the CPU."""
    sizes = torch.bincount(labels)
    rows = torch.full((len(sizes), int(sizes.max())), -1)
    for label, size in enumerate(sizes.tolist()):
        rows[label, :size] = (labels == label).nonzero()[:, 0]
    classes = torch.rand(count, len(sizes), generator=generator).argsort(1)[:, :way]
    scores = torch.rand(count, way, rows.shape[1], generator=generator)
    scores = scores.masked_fill_(rows[classes] < 0, -1)  # padding is drawn last
    rows = rows[classes].gather(2, scores.topk(shot + query, dim=2).indices)
    return rows[:, :, :shot].flatten(1), rows[:, :, shot:].flatten(1)


class Prototypes(torch.nn.Module):
    """A network that classifies an episode: an embedding, and logits from the distances to prototypes.

    images: float (way * (shot + query), 3, H, W), the support images first, both sorted by class. Returns
    the negative squared distance of each query to each prototype, float (way * query, way).
    """

    def __init__(self, embedding, way, shot):
        super().__init__()
        self.embedding, self.way, self.shot = embedding, way, shot

    def forward(self, images):
        embeddings = self.embedding(images)
        support, query = embeddings[: self.way * self.shot], embeddings[self.way * self.shot :]
        prototypes = support.view(self.way, self.shot, -1).mean(1)
        return -(query[:, None] - prototypes).square().sum(2)


def episodes(run, count, generator, stream):
    """Yield `count` episodes (images, labels): float (way * (shot + query), 3, H, W), support first; int64
    (way * query,), class indices within the episode. The stream augments all episodes' queries at once."""
    args, split = run.args, run.dataset.train
    rows = episode_rows(split.labels.cpu(), count, args.way, args.shot, args.query, generator)
    places = (data.upload(part.flatten(), split.images.device) for part in rows)
    support, query = (split.images[place].to(run.device) for place in places)
    for augmentation in stream:
        query = augmentation(query, generator)
    labels = torch.arange(args.way, device=run.device).repeat_interleave(args.query)
    support, query = (data.normalise(images, run.dataset) for images in (support, query))
    for parts in zip(support.chunk(count), query.chunk(count), strict=True):
        yield torch.cat(parts), labels


def kmeans(points, clusters, generator, starts=10):
    """Centres, float (k, D), of k = min(clusters, N) clusters of points, float (N, D), and their inertia: the
    best of ten k-means++ starts (Arthur and Vassilvitskii, 2007), each with up to KMEANS_STEPS of Lloyd's."""
    clusters, best = min(clusters, len(points)), (None, torch.inf)
    for _ in range(starts):
        centres = points[torch.randint(len(points), (1,), generator=generator).to(points.device)]
        while len(centres) < clusters:
            nearest = torch.cdist(points, centres).square().amin(1).cpu()
            probabilities = nearest if nearest.sum() > 0 else torch.ones(len(points))
            chosen = torch.multinomial(probabilities, 1, generator=generator).to(points.device)
            centres = torch.cat([centres, points[chosen]])
        members = torch.cdist(points, centres).argmin(1)
        for _ in range(KMEANS_STEPS):
            belongs = F.one_hot(members, clusters).to(points.dtype)  # (N, k)
            sizes = belongs.sum(0)[:, None]
            centres = torch.where(sizes > 0, belongs.T @ points / sizes.clamp(min=1), centres)
            before, members = members, torch.cdist(points, centres).argmin(1)
            if torch.equal(members, before):
                break
        inertia = torch.cdist(points, centres).square().amin(1).sum().item()
        if inertia < best[1]:
            best = (centres, inertia)
    return best


@torch.no_grad()
def embed(run, model, split):
    """Embeddings of a whole split, float (N, 64), without augmentation."""
    autocast, _ = train.mixed_precision(run)
    model.eval()
    with autocast:
        return torch.cat([model(images) for images, _ in train.evaluation_batches(run, split)])


def classify(embeddings, labels, points, owners, num_classes):
    """Totals if embeddings get the class of their nearest point. points: float (P, D); owners: int64 (P,)."""
    totals = train.Totals(num_classes, embeddings.device)
    for part, true in zip(embeddings.split(BATCH), labels.split(BATCH), strict=True):
        distances = torch.cdist(part, points).square()
        logits = torch.full((len(part), num_classes), -torch.inf, device=part.device)
        logits.scatter_reduce_(1, owners.expand(len(part), -1), -distances, "amax")
        totals.count(logits, true, F.cross_entropy(logits, true))
    return totals


def train_embedding(run):
    """Train on episodes, then test. Returns weights and the run's part of the result file."""
    args = run.args
    torch.manual_seed(run.seed)
    model = models.FewShotEmbedding().to(run.device, memory_format=data.memory_format(run.device))
    network = Prototypes(model, args.way, args.shot)
    print(f"embedding: {train.describe(model, run)}; an epoch is {EPOCH} episodes")
    (stream,) = augment.parse("flip+autoaugment")
    steps = [min(EPOCH, args.episodes - start) for start in range(0, args.episodes, EPOCH)]

    def train_batches(epoch):
        generator = torch.Generator().manual_seed(data.seed_from(run.seed, epoch, "episodes"))
        return episodes(run, steps[epoch - 1], generator, stream)

    history = train.fit(run, network, args.way, steps, train_batches)
    outcome = {"history": history, "episodes": validate(run, model), **test(run, model)}
    show(outcome)
    return {"arch": "fewshot", "state_dict": model.state_dict()}, outcome


def test(run, model):
    """Test metrics with three prototypes per class, with one, and with the nearest training image."""
    dataset, num_classes = run.dataset, len(run.dataset.classes)
    points, tests = embed(run, model, dataset.train), embed(run, model, dataset.test)
    labels, truth = (split.labels.to(run.device) for split in (dataset.train, dataset.test))
    generator = torch.Generator().manual_seed(data.seed_from(run.seed, "kmeans"))
    totals = {}
    for name, clusters in (("test", PROTOTYPES), ("one_prototype", 1)):
        centres = [kmeans(points[labels == label], clusters, generator)[0] for label in range(num_classes)]
        owners = torch.repeat_interleave(torch.tensor([len(c) for c in centres])).to(run.device)
        totals[name] = classify(tests, truth, torch.cat(centres), owners, num_classes)
    totals["nearest_image"] = classify(tests, truth, points, labels, num_classes)
    confusion = totals["test"].confusion.tolist()
    return {**{name: total.metrics() for name, total in totals.items()}, "confusion": confusion}


def validate(run, model):
    """Mean accuracy over episodes of the valid split, not augmented, with its 95 % confidence interval."""
    args, split = run.args, run.dataset.valid
    embeddings = embed(run, model, split)  # once: they are the same in every episode
    generator = torch.Generator().manual_seed(data.seed_from("validation"))
    count, labels = VALIDATION_EPISODES, split.labels.cpu()
    rows = episode_rows(labels, count, args.way, args.shot, args.query, generator)
    rows = torch.cat(rows, dim=1).to(run.device)
    truth = torch.arange(args.way, device=run.device).repeat_interleave(args.query)
    classifier = Prototypes(torch.nn.Identity(), args.way, args.shot)
    hits = torch.stack([(classifier(embeddings[row]).argmax(1) == truth).sum() for row in rows])
    hits = hits.cpu().double() / len(truth)
    interval = 1.96 * hits.std() / len(hits) ** 0.5
    return {"count": len(hits), "accuracy": hits.mean().item(), "confidence95": interval.item()}


def show(outcome):
    valid = outcome["episodes"]
    accuracy = f"accuracy {valid['accuracy']:.4f} ± {valid['confidence95']:.4f} (95 %)"
    print(f"\n{valid['count']} validation episodes: {accuracy}")
    names = {"test": f"{PROTOTYPES} prototypes per class", "one_prototype": "1 prototype per class"}
    names["nearest_image"] = "nearest training image"
    rows = [[name, *(f"{outcome[key][m]:.4f}" for m in train.METRICS)] for key, name in names.items()]
    print(tabulate(rows, ["test split", *train.METRICS], disable_numparse=True))


def make_parser():
    parser = runs.new_parser(__doc__)
    data.add_arguments(parser)
    add, count = parser.add_argument_group("episodes").add_argument, runs.number(int, "[1, inf)")
    queries, small = ", ".join(f"{q} at {p}" for p, q in QUERIES.items()), "fewer on small data sets"
    add("--way", type=runs.number(int, "[2, inf)"), help=f"classes per episode (default: 5, {small})")
    add("--shot", type=count, help=f"support images per class (default: 5, {small})")
    add("--query", type=count, help=f"query images per class (default: {queries}, {small})")
    add("--episodes", type=count, default=3000, help="training episodes (default: %(default)s)")
    train.add_training_arguments(parser)
    runs.add_arguments(parser)
    parser.set_defaults(fraction=0.01)
    return parser


def parse_arguments(argv=None):
    args = make_parser().parse_args(argv)
    train.check_arguments(args)
    return args


def run_name(args, data, only=None):
    """The folder name of a run. data: the data set's name; only: its selected classes, None if all."""
    sizes = recipe(args.fraction)
    settings = {**vars(args), "data": data, "classes": only}
    settings |= {name: settings[name] or size for name, size in sizes.items()}  # None: not chosen yet
    defaults = {**vars(make_parser().parse_args([])), **sizes, "fraction": args.fraction}
    return runs.run_name(("fewshot", f"p{args.fraction!r}"), settings, defaults)


def main():
    folder, results = runs.run_seeds(parse_arguments(), run_name, load, train_embedding)
    train.print_results(folder.name, results)


if __name__ == "__main__":
    runs.command_line(main)
