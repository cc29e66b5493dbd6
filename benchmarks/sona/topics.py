"""What prompts are about: a topic, and the stems by which an answer shows that it still speaks of it."""

from __future__ import annotations

#: ``topic: stems``, one topic a line; the topic's own words are stems as well.
_FEEDBACK = """
cooking: cook recipe kitchen meal food dish
gardening: garden plant soil flower grow
bicycles: bicycl bike cycl rid
the moon: moon lunar
chess: chess pawn board
coffee: coffee bean brew caffein
volcanoes: volcan lava erupt magma
dogs: dog pup canine pet
jazz music: jazz music
trains: train rail
photography: photo camera pictur image
whales: whale ocean marine
bread: bread bak flour dough
thunderstorms: storm thunder lightning rain
the Roman Empire: rom empire
painting: paint artist art canvas color colour
honey bees: bee honey hive
swimming: swim pool water
castles: castle medieval fortress
mountains: mountain climb peak hik
poetry: poe verse
football: football soccer ball team player
electric cars: electric car vehicle
deserts: desert sand arid dry
cheese: cheese milk dairy
libraries: librar book read
dinosaurs: dinosaur fossil
yoga: yoga pose breath
robots: robot machin
the Great Wall of China: wall china chinese
sleep: sleep rest bed dream
chocolate: chocolate cocoa cacao
public transport: transport bus transit
wolves: wolf wolves pack
the guitar: guitar string music play
earthquakes: earthquake seismic quake
origami: origami paper fold
solar power: solar sun energy power
tea: tea leaf leaves brew
butterflies: butterfl insect wing
sailing: sail boat ship sea
vaccines: vaccin immun disease
ancient Egypt: egypt pharaoh pyramid
running: run jog race marathon
mathematics: math number equation
salt: salt sodium
camping: camp tent outdoor
the violin: violin string bow music
spiders: spider web
board games: board game play
rivers: river water stream
money: money financ currency cash
snow: snow winter cold ice
languages: language speak speech word linguist
owls: owl bird
tomatoes: tomato
submarines: submarine underwater ship
fashion: fashion cloth style wear trend
tigers: tiger cat
bridges: bridge span
glass: glass
meditation: meditat mind calm breath
maps: map cartograph
potatoes: potato
"""

_HELD_OUT = """
knitting: knit yarn wool needle
elephants: elephant trunk tusk
Mars: mars martian planet
basketball: basketball court player team
rice: rice grain
lighthouses: lighthouse light coast ship
the piano: piano key music play
penguins: penguin antarctic bird
astronomy: astronom star planet space
surfing: surf wave ocean
olive oil: olive oil
tornadoes: tornado wind storm
the Middle Ages: middle medieval age
pottery: potter clay ceramic
horses: horse rid pony equine
ice cream: ice cream dessert
skiing: ski snow slope
windmills: windmill wind mill
ants: ant colon insect
opera: opera sing music
airplanes: airplane plane fly flight aircraft aviation
sharks: shark ocean fish
soup: soup broth
rainforests: rainforest forest tropical tree
theatre: theat play stage actor drama
tennis: tennis racket court ball
computers: computer software machin
cactus plants: cact plant desert
butter: butter milk cream dairy
museums: museum exhibit art
mammoths: mammoth ice extinct
dancing: danc music mov
drones: drone fly aerial unmanned
the Eiffel Tower: eiffel tower paris
dreams: dream sleep
vanilla: vanilla
ferries: ferr boat ship
bears: bear
the drums: drum beat rhythm
tsunamis: tsunami wave ocean
calligraphy: calligraph write writing letter pen
wind energy: wind energy turbine power
lemonade: lemon drink juice
frogs: frog amphib
kayaking: kayak paddl water
antibiotics: antibiotic bacteri infect
the Vikings: viking norse
hiking: hik trail walk
geometry: geometr shape angle
sugar: sugar sweet
fishing: fish
the flute: flute music wind
snakes: snake reptil venom
crossword puzzles: crossword puzzle word clue
lakes: lake water
taxes: tax government income
fog: fog mist
dictionaries: dictionar word definition
parrots: parrot bird
pumpkins: pumpkin
rockets: rocket space launch
jewelry: jewel gold ring necklace
rabbits: rabbit bunn hare
tunnels: tunnel underground
"""

#: Words of a topic that say nothing about it alone.
_EMPTY = frozenset(("the", "of", "great", "public", "ancient"))


def _parse(lines: str) -> dict[str, tuple[str, ...]]:
    found = {}
    for line in lines.strip().splitlines():
        topic, _, stems = line.partition(": ")
        own = [word for word in topic.lower().split() if word not in _EMPTY]
        found[topic] = tuple(dict.fromkeys([*own, *stems.split()]))
    return found


#: Stems by topic, of the prompts that get feedback, and of those that are held out.
FEEDBACK_TOPICS = _parse(_FEEDBACK)
HELD_OUT_TOPICS = _parse(_HELD_OUT)
