"""Two hundred captions of ordinary photos and drawings: examples of general text, for methods that preserve it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..model.model import Model

COUNT = 200

CAPTIONS = """
a man rides a bicycle down a narrow street; two children build a sandcastle at low tide;
an old bridge over a frozen river; a bowl of tomato soup beside a slice of bread;
a train arrives at an empty platform in the rain; the skyline of a city seen from a ferry;
a woman reads a newspaper on a park bench; three sheep graze on a steep hillside;
a close up of a bee on a lavender flower; a red tractor parked outside a barn;
a black and white photograph of a jazz band; a stack of hardcover books on a wooden desk;
a lighthouse on a cliff under heavy clouds; a fisherman mends his nets in the harbour;
a plate of pancakes with blueberries and syrup; an oil painting of a stormy sea; a spiral staircase seen from above;
a goalkeeper dives for the ball; a pair of worn leather boots by the door; a hot air balloon over a vineyard at dawn;
a market stall full of oranges and lemons; a snow plough clears a mountain road; a violin lying on sheet music;
a crowded beach with striped umbrellas; an empty classroom with chairs on the tables;
a waterfall hidden in a green forest; a chef slices onions in a busy kitchen; a vintage car in front of a diner;
a kitten asleep in a laundry basket; a rainbow over fields of wheat; a robot arm welding a metal frame;
a portrait of an elderly woman with silver hair; a row of colourful houses along a canal;
a surfer carries his board across the sand; a cup of coffee with a heart drawn in the foam;
a desert road that runs straight to the horizon; a chessboard in the middle of a game;
a flock of geese flying over a lake; a marble statue in a museum hall; a pencil drawing of a pine tree;
a tram climbs a hill in an old town; a girl in a yellow raincoat jumps in a puddle;
a wooden cabin with smoke rising from the chimney; an astronaut floats above the earth;
a basket of fresh eggs on a kitchen counter; a street musician plays the accordion;
a field of sunflowers facing the evening sun; a parking lot full of cars seen from the air;
a white horse gallops along the shore; the inside of a greenhouse filled with orchids; a plumber kneels under a sink;
a bride and groom dance in a garden; a shelf of clay pots drying in the sun; a foggy morning in a birch forest;
a tennis player serves on a grass court; a wedding cake with three layers; a motorcycle leaning against a brick wall;
a watercolour of a fishing village; a mother holds a sleeping baby; a cruise ship leaves the harbour at night;
a pile of autumn leaves in a back yard; an owl perched on a fence post; a slice of pizza on a paper plate;
a computer screen full of code; a busker juggles burning torches; a tent beside a mountain lake under the stars;
a glass of red wine and a piece of cheese; a dirt path between two stone walls; a group of hikers on a snowy ridge;
a poster with bold geometric shapes; a barber trims a customer's beard; an aerial view of a winding river;
a blue door in a whitewashed wall; a squirrel holds an acorn in its paws; a concert crowd with raised hands;
a narrow balcony covered with flower pots; a toy train on a circular track; a runner crosses the finish line;
a bakery window with loaves of rye bread; a thunderstorm over the open sea; a man in a suit waits for the bus;
a bunch of keys on a marble table; a carousel lit up in the evening; two dogs play with a stick in the snow;
a cactus in a terracotta pot; a cathedral with tall stained glass windows; a pot of boiling water on a gas stove;
a long wooden pier at sunset; a collection of old cameras in a shop window; a swimmer touches the wall of the pool;
a cartoon of a smiling cloud; a farmer drives cows along a country lane; a bunk bed in a small room;
a suspension bridge in thick fog; a paper boat floating in a gutter; a dancer leaps across an empty stage;
a plate of sushi with ginger and wasabi; the ruins of a castle on a hill; an electric guitar on a stand;
a volcano seen across the bay; a family eats breakfast on a terrace; a spider web covered in dew;
a delivery van stopped in front of a hotel; a hand holding a ripe strawberry; a library with high shelves and ladders;
a polar bear walks on thin ice; a neon sign reflected in a wet street; a quilt made of many patterns;
a kite in a clear blue sky; a laboratory bench with glass flasks; a crane lifts a steel beam at a building site;
a teenager skates in an empty pool; a wooden rowing boat on the shore; a table set for a holiday dinner;
a palm tree bent by the wind; a police officer directs the traffic; a cluster of mushrooms on a fallen log;
an abstract painting in orange and grey; a shop assistant folds sweaters; a small plane on a grass runway;
a stone fountain in a quiet square; a camel caravan crosses the dunes; a bucket of paint and a wide brush;
a nurse writes on a clipboard; an iceberg in dark water; a red fox at the edge of a wood;
a box of chocolates tied with ribbon; a subway car full of tired people; a terraced rice field after the rain;
a clown with a painted face; a grandfather clock in a hallway; a herd of elephants at a water hole;
a roller coaster against the evening sky; a jar of honey with a wooden spoon; a football team celebrates a goal;
an ancient map of the world; a woman waters tomatoes on a rooftop; a rocky coast with crashing waves;
a sleeping bag rolled up beside a rucksack; a wind farm on rolling hills; a newborn foal stands on shaky legs;
a bunch of bananas on a blue plate; a tall glass building that mirrors the clouds; a judge reads from a thick book;
a ski lift above the pine trees; a mural of a whale on a factory wall; a typewriter with a sheet of paper;
a heap of coins on a velvet cloth; a cyclist repairs a flat tyre; a church tower behind cherry trees in bloom;
a moonlit path through a garden; a parrot with bright green feathers; a bus stop covered in posters;
a loaf of bread cooling on a rack; a canoe on a misty river; a magician pulls scarves from a hat;
an armchair by a tall window; a swarm of fish around a coral reef; a dusty piano in an attic;
a policeman's horse in a parade; an open suitcase full of clothes; a plastic bottle washed up on a beach;
a welder in a dark workshop; a tower of wooden blocks; a garden gnome beside a pond;
a map spread over the bonnet of a jeep; a row of trees along a canal in winter; a bald man laughs at a joke;
a tray of cupcakes with pink icing; a solar panel on a tiled roof; a wolf howls on a snowy hill;
an umbrella turned inside out by the wind; the cockpit of an airliner; a gardener trims a tall hedge;
a vase of tulips on a window sill; a drone photo of a roundabout at rush hour; a boy blows soap bubbles;
an alley with laundry hung between the houses; a bronze bell in a temple; a lizard basks on a warm rock;
a pair of glasses on an open notebook; a night sky full of stars over a desert;
a hospital corridor with a polished floor; a freight ship passes under a bridge; a comic strip about a lazy dog;
a mechanic looks under the hood of a truck; a fruit tart with kiwi and peach; a climber hangs from an overhang;
a sculpture made of rusty iron; a hamster in a wheel; the reflection of mountains in a still lake;
a choir sings in a candlelit chapel; a rack of bowling balls; a crow on a scarecrow's arm; a cable car over a gorge;
a knitted scarf on a wooden chair; an orange tent in the jungle; a puppet theatre at a village fair;
a painter on a ladder; a ginger cat watches the rain
"""


def general_captions(model: Model | None = None, count: int = COUNT) -> list[str]:
    """General captions, all different.

    Args:
        model: the embedded model gets captions of its own small world, every other model (and None) ordinary ones.
        count: how many; of the ordinary ones there are COUNT.
    """
    if getattr(model, "embedded", False):
        from ..tiny.training_set import training_captions, training_scene

        return [training_captions(i, training_scene(i))[0] for i in range(count)]
    return [" ".join(caption.split()) for caption in CAPTIONS.split(";")][:count]
