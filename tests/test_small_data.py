"""One rule says what is held out: every stage keeps each episode on its side, whatever else it leaves out."""

from itertools import cycle

import torch


def test_every_stage_holds_out_the_same_episodes_whatever_it_leaves_out(tmp_path, write_squares, caplog):
    """A clip takes 17 raw frames, latent actions 3 latent frames, the world action model 2, an offset its first one."""
    from latent_action import LatentActionConfig, LatentActionTokenizer
    from latent_action.datamodule import LatentActionData
    from latent_action.labelling import label_shards
    from repvitok import RepViTok, RepViTokConfig
    from repvitok.data import LatentShards, LeRobotReader
    from repvitok.data.datamodule import ClipDataModule
    from repvitok.data.split import split_episodes
    from repvitok.encoding import encode_dataset
    from repwam_core.data.episodes import EpisodeStore

    numbers, share = range(3, 63, 4), 0.3
    whole = split_episodes(numbers, share)
    lengths = {number: length for side in whole for number, length in zip(side, cycle([20, 10, 6, 4, 2]), strict=False)}
    root = write_squares(tmp_path / "data", dict(sorted(lengths.items())))
    torch.manual_seed(0)
    tokenizer = RepViTok(RepViTokConfig(width=16, depth=1, heads=2, latent_dim=8)).eval()
    encode_dataset(tokenizer, LeRobotReader(root), tmp_path / "latents", size=(16, 16), offsets=(0, 2))
    meta = LatentShards(tmp_path / "latents").meta
    lat = LatentActionTokenizer(LatentActionConfig(latent_dim=8, hidden=8).fitted_to(meta))
    label_shards(lat, tmp_path / "latents", tmp_path / "labelled")

    clips = ClipDataModule([str(root)], (16, 16), frames=17, held_out=share)
    clips.setup("fit")
    assert clips._val is not None
    sources = [[s.describe(v) for s in side.sources for v in range(len(s))] for side in (clips._train[0], clips._val)]
    transitions = LatentActionData(str(tmp_path / "latents"), held_out=share)
    tables = [loader.table for loader in (transitions.train_dataloader(), transitions.val_dataloader())]
    store = EpisodeStore(tmp_path / "labelled", space="latent", held_out=share)
    rows = (store.train_episodes, store.val_episodes)
    found = {
        17: [{int(name.split("episode ")[1].split(",")[0]) for name in side} for side in sources],
        9: [set(table.episode.tolist()) for table in tables],
        5: [{store.infos[row].episode_index for row in side} for side in rows],
    }
    for shortest, sides in found.items():
        expected = [{number for number in side if lengths[number] >= shortest} for side in whole]
        assert all(expected), "both sides lose some and keep some"
        assert sides == expected, f"the stage that needs {shortest} raw frames"
    for needed in ("offset 2 takes 3 frames", "a clip takes 17 frames", "3 latent frames are", "2 latent frames are"):
        assert needed in caplog.text
