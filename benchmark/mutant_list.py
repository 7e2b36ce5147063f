"""The bugs that mutants.py plants: (file, old text, new text, what it is); the old text is in its file exactly once.

Left out is what changes nothing that is computed, such as 0 times a weight, or a sum over nobody.
"""

NETWORK = [
    ("orthogonal_(layer.weight, std)", "xavier_uniform_(layer.weight, std)", "weights are not orthogonal"),
    ("    nn.init.zeros_(layer.bias)\n", "", "biases do not begin at zero"),
    ("2 * num_actions), std=0.01)", "2 * num_actions))", "the actor begins with the gain of hidden layers"),
    ("1), std=0.01)\n", "1))\n", "the team's critic begins with the gain of hidden layers"),
    (", nn.LayerNorm(width), nn.ReLU())", ", nn.ReLU())", "no LayerNorm"),
    ("nn.Sequential(nn.ReLU(), ", "nn.Sequential(nn.Identity(), ", "no ReLU before the second layer of the trunk"),
    ("F.relu(self.conv1(x))", "self.conv1(x)", "no ReLU between the convolutions"),
    ("F.relu(self.squeeze(y.mean((2, 3))))", "self.squeeze(y.mean((2, 3)))", "no ReLU in squeeze-and-excitation"),
    ("y.mean((2, 3))", "y.amax((2, 3))", "the maximum is squeezed instead of the mean"),
    ("F.relu(x + y * weight[..., None, None])", "x + y * weight[..., None, None]", "no ReLU after the block"),
    ("row = live // E", "row = live // B", "rows are counted by the number of boards"),
    ("x, y = obs", "y, x = obs", "x and y swapped"),
    ("index_select(0, live)\n", "index_select(0, live).clamp(-1, 1)\n", "features are clipped"),
    ("torch.cat([map.mean((2, 3)), ", "torch.cat([map.sum((2, 3)), ", "the sum instead of the mean of the map"),
    ("F.max_pool2d(map, (h, w)).flatten(1)", "map.mean((2, 3))", "no maximum in the summary of the map"),
    ("map.permute(0, 2, 3, 1)", "map", "the map is read across its channels"),
    ("h + x // TILE) * w + y //", "h + y // TILE) * w + x //", "the map is read at the mirror image"),
    ("(row * h + x // TILE)", "(x // TILE)", "everybody reads the map of the first board"),
    ("self.patch.weight / 100", "self.patch.weight", "the patch is read in percent"),
    ("place, features, action_mask]", "place, features, ~action_mask]", "the network sees what is forbidden"),
    ("[patch, place, features", "[patch.detach(), place, features", "the patch does not learn"),
    ("self.far(whole)", "self.far(whole.detach())", "no gradient to the map from its summary"),
    ("near + self.far(", "near * self.far(", "near and far are multiplied"),
    ("== self.factory_kind", ">= self.factory_kind", "the kinds after factories act by the factories' head"),
    ("self.actor(hidden)", "self.actor(hidden.detach())", "the policy is cut off from the trunk"),
    ("factory_logits, robot_logits)", "robot_logits, robot_logits)", "factories act by the robots' head"),
    ("~action_mask, -1e9)", "~action_mask, 0)", "masked actions keep a probability"),
    ("new_zeros(B * E, self.num_actions)", "new_ones(B * E, self.num_actions)", "empty slots have logits"),
    ("self.critic(hidden)", "self.critic(hidden.detach())", "the critic is cut off from the trunk"),
    ("self.critic(hidden)", "self.critic(near)", "the critic reads what is before the trunk"),
    ("keepdim=True).clamp(min=1)", "keepdim=True)", "0 / 0 where nobody is"),
    (" / count", "", "the sum instead of the mean of hidden"),
    (".index_add(0, row, hidden)", ".index_copy(0, row, hidden)", "the last entity stands for the team"),
    ("[mean, whole]", "[mean, whole.detach()]", "the team's critic is cut off from the map"),
    ("shape[2] % TILE, 0, -board.shape[1]", "shape[1] % TILE, 0, -board.shape[2]", "padding of the other side"),
    ("h, w = H // TILE, W // TILE", "w, h = H // TILE, W // TILE", "tiles along and across are swapped"),
    ("self.stem.weight / 100", "self.stem.weight", "the board is read in percent"),
    (", self.stem.bias)", ")", "the stem has no bias"),
    ("self.block(map", "(map", "no residual block"),
    ("TILE, PATCH = 8, 5", "TILE, PATCH = 8, 3", "the patch has 3 x 3 cells"),
    ("(x >= 0)", "(x > 0)", "the first row of the board is not seen"),
    ("(y >= 0) & ", "", "beyond the edge the row before is seen"),
    ("* H + x) * W + y", "* W + x) * H + y", "patches are read with the sides swapped"),
    ("board.new_zeros(1, C)", "board.new_ones(1, C)", "beyond the edge is 1 percent of everything"),
]

# Planted in one of the two scripts, in turns
SCRIPTS = [
    ('"active": active[:-1]}', '"active": active[1:]}', "activity of the next step"),
    (
        '{"value": values[:-1], "advantage"',
        '{"value": values[1:], "advantage"',
        "old values of the next step (explained variance)",
    ),
    ('"advantage": advantages, "return": returns', '"advantage": returns, "return": returns', "returns as advantages"),
    (
        '"advantage": advantages, "return": returns',
        '"advantage": advantages, "return": advantages',
        "values learn the advantages",
    ),
    ('{"action": actions, ', '{"action": actions.roll(1, 0), ', "actions of the step before"),
    ('"logprob": logprobs,', '"logprob": logprobs.roll(1, 1),', "old log probabilities of another team"),
    ("torch.max(pg_loss1, pg_loss2)", "pg_loss1", "no clipping of the ratio"),
    ("- ent_coef * entropy_loss", "+ ent_coef * entropy_loss", "the entropy bonus has the wrong sign"),
    ("args.gamma, args.gae_lambda)", "args.gae_lambda, args.gamma)", "gamma and lambda swapped"),
    ('errors = batch["return"] - batch["value"]', 'errors = batch["return"]', "explained variance of nothing"),
    (
        '"explained_variance": 1 - (residual / total)',
        '"explained_variance": (residual / total)',
        "explained variance upside down",
    ),
    ('"clipfrac": np.mean(clipfracs)', '"clipfrac": clipfracs[-1]', "clipfrac of the last minibatch"),
    (
        'LOSSES = ("policy_loss", "value_loss"',
        'LOSSES = ("value_loss", "policy_loss"',
        "losses are logged under the other's name",
    ),
    ('"clipfrac", "grad_norm")', '"grad_norm", "clipfrac")', "gradient norm and clipfrac swapped in the log"),
    (
        'writer.add_scalar("charts/ent_coef", ent_coef,',
        'writer.add_scalar("charts/ent_coef", args.ent_coef,',
        "the entropy coefficient at the start is logged",
    ),
    ("held_out=True, video=video", "video=video", "the evaluation plays training maps"),
    (
        "envs = make_envs(args, args.eval_episodes,",
        "envs = make_envs(Args(), args.eval_episodes,",
        "the evaluation plays the default game",
    ),
    (
        "action = torch.multinomial(logits.softmax(-1).flatten(0, -2), 1, generator=generator)",
        "action = logits.argmax(-1)",
        "the evaluation takes the likeliest actions",
    ),
    (
        "finished[match] = finished[match] or episode",
        "finished[match] = episode",
        "later matches of the evaluation overwrite the first",
    ),
    ("num_workers=args.num_workers, held_out", "num_workers=0, held_out", "--num-workers is ignored in the evaluation"),
    ("update % args.save_every == 0", "update % 20 == 0", "--save-every is ignored"),
    ("    torch.manual_seed(args.seed)\n", "    torch.manual_seed(1)\n", "every seed has the same parameters"),
    ("        max_robots=args.max_robots,\n", "", "--max-robots is ignored"),
    ("        safe_masks=args.safe_masks,\n", "", "--safe-masks is ignored"),
    (
        "max_grad_norm)\n                losses",
        "max_grad_norm * 10)\n                losses",
        "gradients are clipped at ten times the norm",
    ),
    (
        "return torch.where(mask, x, 0).sum() / count.clamp(min=1)",
        "return x.sum() / count.clamp(min=1)",
        "masked_mean: inactive cells count",
    ),
    (
        "return torch.where(mask, x, 0).sum() / count.clamp(min=1)",
        "return torch.where(mask, x, 0).sum()",
        "masked_mean: sum",
    ),
    (
        "torch.stack([mask.sum(), x.sum(), (x**2).sum()])",
        "torch.stack([mask.sum(), x.sum(), x.sum() ** 2])",
        "all_moments: square of the sum",
    ),
    (
        "return count.float(), mean.float(), variance.float()",
        "return count.float(), variance.float(), mean.float()",
        "mean and variance swapped",
    ),
]

# Planted where the two scripts differ
SEPARATE = [
    (
        'x = torch.where(obs["kind"] > 0, x, 0)\n    return torch.zeros',
        'x = torch.where(obs["kind"] >= 0, x, 0)\n    return torch.zeros',
        "group_sum: empty slots count",
    ),
    (
        'x = torch.where(obs["kind"] > 0, x, 0)\n    return torch.zeros',
        'x = torch.where(obs["kind"] > 1, x, 0)\n    return torch.zeros',
        "group_sum: factories do not count",
    ),
    ('.scatter_add(-1, obs["group"], x)', '.scatter(-1, obs["group"], x)', "group_sum: last member instead of sum"),
    (
        '.scatter_add(-1, obs["group"], x)',
        ".scatter_add(-1, torch.arange(x.shape[-1]).expand(x.shape), x)",
        "group_sum: group is own slot",
    ),
    ('if args.critic == "global":', 'if args.critic != "global":', "critic switched"),
    (" / group_sum(torch.ones_like(value), obs).clamp(min=1)", "", "value of a group is the sum"),
    ("group_sum(torch.ones_like(value), obs).clamp(min=1)", "value.shape[-1]", "value of a group divided by all slots"),
    ("weight * reward + (1 - weight) * mean", "(1 - weight) * reward + weight * mean", "share swapped"),
    ("weight * reward + (1 - weight) * mean", "weight * reward", "no team share"),
    ("weight * reward + (1 - weight) * mean", "reward + (1 - weight) * mean", "own share not weighted"),
    (
        "share_reward(advantages, active[:-1], 0.0)",
        "share_reward(advantages, active[1:], 0.0)",
        "global advantage among those of the next step",
    ),
    (
        "returns = advantages + values[:-1]",
        'shared = share_reward(advantages, active[:-1], 0.0) if args.advantage == "global" else advantages\n'
        "            returns = shared + values[:-1]",
        "returns from the global advantage",
    ),
]
GLOBAL = [
    (
        'torch.where(obs["kind"] > 0, x, 0).sum(-1, keepdim=True)',
        "x.sum(-1, keepdim=True)",
        "group_sum: empty slots count",
    ),
    (
        'torch.where(obs["kind"] > 0, x, 0).sum(-1, keepdim=True)',
        'torch.where(obs["kind"] > 1, x, 0).sum(-1, keepdim=True)',
        "group_sum: factories do not count",
    ),
    (
        'torch.where(obs["kind"] > 0, x, 0).sum(-1, keepdim=True)',
        'torch.where(obs["kind"] > 0, x, 0).mean(-1, keepdim=True)',
        "group_sum: mean over slots",
    ),
    ("return team_value[..., None]", "return group_sum(value, obs)", "value of the team is the sum of its entities'"),
    (
        "rewards[step] = group_sum(reward, step_obs)",
        "rewards[step] = group_sum(reward, step_obs) / group_sum(torch.ones_like(reward), step_obs).clamp(min=1)",
        "reward is the mean",
    ),
]

WRAPPER = [
    (
        '"ice_distance")] = _way_to_nearest(ice)',
        '"ice_distance")] = _way_to_nearest(ore)',
        "the way to ore in place of ice",
    ),
    (
        'self.ground[teams, ..., COLUMN["on_ice"]], self.ground[teams, ..., COLUMN["on_ore"]] = ice, ore',
        'self.ground[teams, ..., COLUMN["on_ice"]], self.ground[teams, ..., COLUMN["on_ore"]] = ore, ice',
        "on_ice and on_ore swapped",
    ),
    (
        "under_way = DIG if order == 3 else",
        "under_way = STAY if order == 3 else",
        "read_observation: a dig under way is not seen",
    ),
    (
        'DIG if order.act_type == "dig" else',
        'STAY if order.act_type == "dig" else',
        "read_engine: a dig under way is not seen",
    ),
    (
        '("opponent_factories", alive[self.opponent] / 5)',
        '("opponent_factories", alive / 5)',
        "the opponent's factories are the own",
    ),
    ('("is_day", time % CYCLE < DAY)', '("is_day", time % CYCLE <= DAY)', "the day is one step longer"),
    ('("time", time / GAME_LENGTH)', '("time", time % CYCLE / GAME_LENGTH)', "time begins anew with every day"),
    (
        "self.max_factories, self.num_entities)) - set(slots.values())",
        "self.max_factories, self.num_entities)) - set(slots[u] for u in rows if u in slots)",
        "a slot is used again in the step of the death",
    ),
    (
        "return np.where(self.alive[team], distance, 10**6).argmin()",
        "return distance.argmin()",
        "robots may belong to a dead factory",
    ),
    (
        "distance = np.abs(self.factories.x[team] - x) + np.abs(self.factories.y[team] - y)",
        "distance = np.abs(self.factories.x[team ^ 1] - x) + np.abs(self.factories.y[team ^ 1] - y)",
        "robots belong by the opponent's factories",
    ),
    (
        "own[player, x : x + 3, y : y + 3] = slot + 1",
        "own[player, x : x + 3, y : y + 3] = slot",
        "the first factory is not on the map",
    ),
    (
        "self.centre_map[team, x + 1, y + 1] = True",
        "self.centre_map[team ^ 1, x + 1, y + 1] = True",
        "rule 2: centres of the opponent",
    ),
    (
        'CHANNEL["opponent_factory"]] = drawn[::-1] * 100',
        'CHANNEL["opponent_factory"]] = drawn * 100',
        "the opponent's factories are the own on the board",
    ),
    (
        'maps[team ^ 1, ..., CHANNEL["opponent_lichen"]] = lichen',
        'maps[team, ..., CHANNEL["opponent_lichen"]] = lichen',
        "the opponent's lichen is the own",
    ),
    (
        "(robots.team ^ 1, robots.x, robots.y, opponent)",
        "(robots.team ^ 1, robots.y, robots.x, opponent)",
        "the opponent's robots at their mirror image",
    ),
    (
        "features[..., COLUMN[name]] = np.minimum(getattr(factories, name) / 1000, 3)",
        "features[..., COLUMN[name]] = np.minimum(getattr(factories, name) / 1000, 2)",
        "factory stocks cut at 2",
    ),
    (
        'features[..., COLUMN["home_water"]] = features[..., COLUMN["water"]]',
        'features[..., COLUMN["home_water"]] = features[..., COLUMN["metal"]]',
        "a factory's home_water is its metal",
    ),
    (
        "lights, heavies = built[..., :width]",
        "heavies, lights = built[..., :width]",
        "group_lights and group_heavies swapped",
    ),
    (
        "(factories.metal >= METAL_COST[heavy])",
        "(factories.metal > METAL_COST[heavy])",
        "building needs one metal more",
    ),
    ("(factories.power >= POWER_COST[heavy])", "(factories.metal >= 0)", "building asks for no power"),
    (
        "waiting = ((heavies == 0) & can_heavy)",
        "waiting = ((heavies > 0) & can_heavy)",
        "rule 3: slots are kept for those with a heavy robot",
    ),
    (
        "can_light &= (heavies > 0) | (factories.metal >= METAL_COST.sum())",
        "can_light &= (heavies > 0) & (factories.metal >= METAL_COST.sum())",
        "rule 3: metal, and for or",
    ),
    ("            has_slot &= ~taken\n", "", "rule 3: building onto an own robot"),
    (
        "(factories.water > reserve) & (factories.water - cost >= reserve)",
        "(factories.water > reserve)",
        "rule 7: the cost of watering is not counted",
    ),
    (
        "cost = self._water_costs()[self.teams // 2, factories.strain]",
        "cost = self._water_costs()[0 * self.teams, factories.strain]",
        "watering costs those of the first match",
    ),
    (
        "self.lichen >= LICHEN_TO_SPREAD - 2",
        "self.lichen >= LICHEN_TO_SPREAD",
        "water: lichen that has just withered does not spread",
    ),
    ("cells[:, 1:] |= spreading[:, :-1]", "cells[:, 1:] |= cells[:, :-1]", "water: all lichen spreads to the right"),
    ("number = 12 + np.array", "number = 9 + np.array", "water: nine cells at the edge"),
    (
        '(("power", power / battery), ("ice", ice / cargo), ("ore", ore / cargo))',
        '(("power", power / battery), ("ice", ore / cargo), ("ore", ice / cargo))',
        "robots: ice and ore swapped",
    ),
    (
        'out["features"][team, nearest, COLUMN[name]]',
        'out["features"][team ^ 1, nearest, COLUMN[name]]',
        "home_water of the opponent's factory",
    ),
    (
        "features[:, COLUMN[name]] = under_way == action",
        "features[:, COLUMN[name]] = under_way != action",
        "orders that are not under way",
    ),
    (
        "(np.arange(len(ROBOT_ACTIONS))[:, None] != under_way)",
        "(np.arange(len(ROBOT_ACTIONS))[:, None] == under_way)",
        "only going on costs an order",
    ),
    ("        left[DIG] -= DIG_COST[heavy]\n", "", "a dig costs nothing"),
    ("        can_do[MOVES] &= ~closed[MOVES]\n", "", "steps off the board"),
    ("own_factory.any(0) & (ice + ore > 0)", "own_factory.any(0)", "delivering nothing"),
    (
        "self.factories.power[team, nearest])",
        "self.factories.water[team, nearest])",
        "picking up the factory's water as power",
    ),
    (
        "~(self.robot_map | self.centre_map).take(cells_of_team[MOVES])",
        "~self.centre_map.take(cells_of_team[MOVES])",
        "rule 1 is off",
    ),
    (
        "~(self.robot_map | self.centre_map).take(cells_of_team[MOVES])",
        "~self.robot_map.take(cells_of_team[MOVES])",
        "rule 2 is off",
    ),
    (
        "to_mine = ~own_lichen & ((on_ice & (ice < cargo))",
        "to_mine = ~own_lichen & ((on_ice & (ice <= cargo))",
        "rule 4: ice with full cargo",
    ),
    ("can_do[PICK_UP] &= gain >= 10 * order_cost", "can_do[PICK_UP] &= gain >= order_cost", "rule 6 is off"),
    ("            can_do[DIG] &= left[DIG] >= way_home[here]\n", "", "rule 5: digging is off"),
    (
        "(np.minimum(steps_home, 2) + 1) * order_cost",
        "(np.minimum(steps_home, 1) + 1) * order_cost",
        "rule 5: one order less",
    ),
    ("np.where(heavy, HEAVY, LIGHT)", "np.where(heavy, LIGHT, HEAVY)", "kinds of robots swapped"),
    (".argmax(0)\n        self.deliver_to", ".argmin(0)\n        self.deliver_to", "deliveries go beside the factory"),
    (
        "np.flatnonzero(action != self.robots.under_way)",
        "np.flatnonzero(action >= 0)",
        "orders that go on are given again",
    ),
    ("        if self.safe_masks:\n            action = self._give_way(action)\n", "", "nobody gives way"),
    ("spare = robots.power - 2 * order_cost", "spare = robots.power", "moves are ordered with all the power"),
    (
        "(action == DELIVER, (1, self.deliver_direction, more_ore, most, 0, 1))",
        "(action == DELIVER, (1, self.deliver_direction, ~more_ore, most, 0, 1))",
        "the other resource is delivered",
    ),
    ("(action == DIG, (3, 0, 0, 0, 0, digs))", "(action == DIG, (3, 0, 0, 0, 0, moves))", "as many digs as moves"),
    ('"ice_dug": 0.004,  #', '"ice_dug": 0.04,  #', "weight of ice_dug"),
    ('"lichen_grown": 0.0001,  #', '"lichen_grown": 0.001,  #', "weight of lichen_grown"),
    ('pay("ice_dug", who, dug[0])', 'pay("ice_dug", who, dug[1])', "ore pays as ice"),
    (
        "lost * np.where(heavy, 1.0, 0.1)",
        "lost * np.where(heavy, 0.1, 1.0)",
        "a light robot costs as much as a heavy one",
    ),
    (
        "np.add.at(arrived, (who[0], encoder.deliver_to[rows]), brought.T)",
        "arrived[who[0], encoder.deliver_to[rows]] = brought.T",
        "of several deliveries only the last arrives",
    ),
    ('pay("factory_lost", who, ~survived)', 'pay("factory_lost", who, survived)', "factories that survive are lost"),
    (
        'pay("lichen_grown", who, (lichen - self.lichen)[strain])',
        'pay("lichen_grown", who, lichen[strain])',
        "all lichen counts as grown at every step",
    ),
    (
        "self.rngs[index].integers(HELD_OUT_SEEDS, 2**31)",
        "self.rngs[index].integers(0, 2**31)",
        "training may play held-out maps",
    ),
    (
        "self.weights = np.array([reward_weights[term] for term in TERM])",
        "self.weights = np.array([REWARDS[term] for term in TERM])",
        "reward_weights are ignored",
    ),
]

MUTANTS = [
    *(("hybrid_model.py", *row) for row in NETWORK),
    *((("trajsep_ppo.py", "global_ppo.py")[index % 2], *row) for index, row in enumerate(SCRIPTS)),
    *(("trajsep_ppo.py", *row) for row in SEPARATE),
    *(("global_ppo.py", *row) for row in GLOBAL),
    *(("lux_wrapper.py", *row) for row in WRAPPER),
]
