"""English words for prompts.

RULER takes its words from the package wonderwords. These are a list of our own, so that no package
and no version of one decides what a seed gives; to change a word here changes it.
"""

_ADJECTIVES = """
able amber ancient autumn awake balanced bashful blue bold brave brief bright brisk broad bronze
busy calm careful cheap cheerful chilly clean clever cloudy coarse cold common copper cosy
crimson crisp curious damp daring dark deep dense distant dry dull eager early earnest easy
elastic empty even faint fair famous fancy fast final firm flat fond formal fragile free fresh
frosty full gentle giant glad golden grand grateful green grey handy happy harsh hasty heavy
hidden hollow honest huge humble hungry icy idle ivory jolly keen kind large late lazy lean
light lively local lonely long loose loud loyal lucky major mellow merry mild minor modest moist
narrow neat new nimble noble noisy numb odd old open orange ordinary pale patient perfect plain
playful pleasant polite poor precious pretty prompt proud pure purple quick quiet rapid rare
ready red regular remote rich ripe robust rough round royal rusty safe salty scarlet secret
serious shallow sharp shiny short shy silent silver simple sleepy slim slow small smooth soft
solid sour spare spicy steady steep stiff strange strict strong sturdy subtle sudden sunny sweet
swift tall tame tender thick thin thirsty tidy tight tiny tired tough tranquil urgent useful
vague vast violet vivid warm weak wealthy weary wet white wide wild windy wise wooden yellow
young
"""
_NOUNS = """
acorn actor address airport album alley almond anchor ankle answer apple apron arch arena arrow
artist aunt avenue badge bagel bakery balcony ball banana bank banner barn barrel basin basket
bath battle beach beacon bean bear beard bed bee beetle bell belt bench berry bicycle bird
biscuit blanket block board boat bone bonnet book boot border bottle boulder bowl box bracelet
branch bread breeze brick bridge broom brother brush bucket building bundle bus bush butter
button cabin cabinet cactus cake camel camera camp canal candle candy cannon canoe canvas cap
captain car card cargo carpet carrot cart castle cat cave ceiling cellar chain chair chalk
chapel chapter cheese cherry chest chicken child chimney chin church cinema circle city clay
cliff clock cloth cloud clover coach coal coast coat coffee coin collar comb comet compass
concert cook cookie copy coral corn corner cottage cotton couch country cousin cow crab cradle
crane crate crater crayon creek crow crown cube cup cupboard curtain curve cushion dairy daisy
dance daughter dawn deck deer desert desk dessert diamond diary dinner dish doctor dog doll
dolphin donkey door dragon drawer dream dress drum duck dust eagle ear earth echo egg elbow
elephant elm ember engine envelope evening eye fabric face factory falcon family farm farmer
fence fern ferry festival field finger fire fish flag flame flask flock floor flour flower flute
fog folder forest fork fort fossil fountain fox frame friend frog fruit funnel galaxy gallery
garage garden garlic gate geese gift ginger giraffe glacier glass globe glove goat goose grain
grape grass gravel grove guard guest guide guitar gull hall hammer hammock hand harbour hare
harp harvest hat hawk hay hazel heart hedge helmet hen herb heron hill hinge hive holiday honey
hood horizon horn horse hotel hour house hut ink insect island ivy jacket jar jelly jewel
journey judge jug juice jungle kettle key kitchen kite kitten knee knife knot ladder lady lake
lamb lamp lane lantern laptop lawn leaf leather lemon lesson letter library lid lily lime lion
lizard lobster locket log lunch machine magnet map maple marble market mask mast meadow meal
melon member meteor milk mill mirror mist mitten monkey month moon morning moss moth mother
motor mountain mouse mouth museum mushroom music nail napkin neck needle nephew nest net nickel
night noodle north nose note notebook novel number nurse nut oak oar oasis ocean office olive
onion orchard orchid organ otter oven owl oyster paddle page paint palace palm pan panda paper
parade parcel park parrot party pasta path patio peach peak peanut pear pearl pebble pelican
pencil penguin people pepper piano picnic picture pie pigeon pillow pilot pine pipe pirate
pitcher plane planet plank plate plough plum pocket poem poet pond pony poppy porch port
postcard potato powder prairie prince prize puddle pump pumpkin pupil puppy puzzle queen quilt
rabbit radio raft railway rain raisin rake raven recipe reef ribbon rice riddle ring river road
robin robot rocket roof room rooster root rope rose rubber ruby rug ruler saddle sail sailor
salad salmon salt sandal sauce saucer scale scarf school scooter screen sea seal season seat
seed shadow shark sheep shelf shell shepherd ship shirt shoe shop shore shoulder shovel shower
signal singer sink sister skate sketch ski skirt sky sled sleeve slipper snail snake snow soap
sock sofa soil soldier song soup spade sparrow spider spinach spire sponge spoon square squirrel
stable stadium stage stairs stamp star station statue steam stem stone stool store stork storm
stove straw stream street string student studio suitcase summer sun swallow swan sweater swing
sword table tailor teacher teapot temple tent theatre thimble thistle thread throne thumb
thunder ticket tiger tile timber toast toe tomato tongue tool tooth torch tower town toy tractor
trail train tray treasure tree trousers truck trumpet trunk tulip tunnel turkey turtle uncle
valley vase velvet village vine violin visitor volcano voyage wagon waist wall walnut walrus
watch water wave wax weather wedding whale wharf wheat wheel whisker whistle widow willow window
wing winter wolf wood wool worm wrist yard yarn year zebra
"""
_VERBS = """
admit adopt advise agree allow amuse appear applaud argue arrive assist attach attend bake bathe
begin believe belong blend blink boil borrow bounce breathe build bury carry carve catch cheer
chew choose clap climb collect compare complain connect consider contain count cover crawl cure
dare decide decorate defend deliver depend describe dig divide draw drift drink drive earn eat
enjoy enter escape examine exist expand expect explain explore fasten fetch fill find finish
float fold follow forget forgive freeze gather give glow greet grind grow guess hang heat help
hope hover hug hunt hurry imagine improve include invent invite join juggle jump kick kneel knit
know laugh launch lead learn leave lend lift listen live load look love melt mend mention miss
mix mumble murmur nod notice obey observe obtain offer order pack pause peel perform plant plead
please polish pour pray prefer prepare preserve press pretend promise protect provide pull punch
push raise reach read receive recite refuse relax remain remember remind remove repair repeat
reply rescue rest return ride rinse roar roll rub run save scatter scrape scratch scream scrub
search sell send settle sew shake share shave shelter shine shiver shout sigh sing sip sit skip
sleep slide smell smile sneeze sniff snore speak spell spend spill spin splash sprinkle squeeze
stand stare start stay steer stir stitch stop stretch study suggest supply support surprise
surround swim switch talk taste teach tease tell thank think throw tickle tie touch trace trade
travel tremble trim trust try tug turn twist unite unlock vanish visit wait wake walk wander
warn wash weave welcome whisper wink wipe wish wonder work worry wrap write yawn yell
"""

ADJECTIVES, NOUNS, VERBS = (tuple(text.split()) for text in (_ADJECTIVES, _NOUNS, _VERBS))
